// Bound by memory: forward reads u and the shortcut and writes out, backward reads grad, u and out
// and writes du and dshortcut, each element once.
#include "ops/residual_gate/op.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {
namespace {

// Gradients of h are summed in the compute type within a block and in double over the blocks.
constexpr Size kBlock = 1024;       // elements of a plane (NCHW)
constexpr Size kBlockPixels = 256;  // channels_last
constexpr Size kTile = 64;          // channels of a task (channels_last)

// Pixels are rows of channels.
bool in_rows(const ResidualGateInputs& args) { return args.channels_last || args.area == 1; }

template <class T>
Results<T> results(const ResidualGateInputs& args, void* data) {
  return {as<T>(data), args.batch * args.channels * args.area,
          in_rows(args) ? args.channels : args.area};
}

// ---- forward ------------------------------------------------------------------------------------

template <class T>
struct Join {
  using A = Compute<T>;
  const T *u, *shortcut;
  Results<T> out;

  void operator()(Size i, int n, Vec<A> h) const {
    const Vec<A> sum = load_n(u + i, n) * h + load_n(shortcut + i, n);
    out.put(i, sum < A(0) ? Vec<A>{} : sum, n);  // NaN stays
  }
};

template <class T>
void forward(const ResidualGateForward& args) {
  using A = Compute<T>;
  const Join<T> join{as<T>(args.u), as<T>(args.shortcut), results<T>(args, args.out)};
  const A* h = as<A>(args.h);
  if (in_rows(args)) {
    parallel_for(args.threads, args.batch * args.area, [&](Size pixel) {
      const A* factors = h + pixel / args.area * args.channels;
      for_vectors<A>(args.channels, [&](Size c, int n) {
        join(pixel * args.channels + c, n, load_n(factors + c, n));
      });
    });
  } else {
    parallel_for(args.threads, args.batch * args.channels, [&](Size plane) {
      for_vectors<A>(args.area, [&](Size i, int n) {
        join(plane * args.area + i, n, splat(h[plane]));
      });
    });
  }
}

// ---- backward -----------------------------------------------------------------------------------

template <class T>
struct Gradients {
  using A = Compute<T>;
  const T *grad, *u, *out;
  Results<T> du, dshortcut;

  // Writes du and dshortcut of n elements and returns their terms of dh.
  Vec<A> operator()(Size i, int n, Vec<A> h) const {
    const Vec<A> passed = load_n(out + i, n) <= A(0) ? Vec<A>{} : load_n(grad + i, n);
    const Vec<A> term = passed * load_n(u + i, n);
    du.put(i, passed * h, n);
    dshortcut.put(i, passed, n);
    return term;
  }
};

template <class T>
void planes_backward(const ResidualGateBackward& args, const Gradients<T>& gradients) {
  using A = Compute<T>;
  parallel_for(args.threads, args.batch * args.channels, [&](Size plane) {
    const Vec<A> h = splat(as<A>(args.h)[plane]);
    const Size end = (plane + 1) * args.area;
    double total = 0;
    for (Size first = plane * args.area; first < end; first += kBlock) {
      Vec<A> terms = {};
      for_vectors<A>(std::min(kBlock, end - first),
                     [&](Size i, int n) { terms += gradients(first + i, n, h); });
      total += sum<A>(terms);
    }
    as<A>(args.dh)[plane] = static_cast<A>(total);
  });
}

// Channels [0, width) of `pixels` rows from element `first` on: adds their terms to totals.
template <class T>
void add_rows(const Gradients<T>& gradients, const Compute<T>* h, Size first, Size pixels,
              Size stride, Size width, double* totals) {
  using A = Compute<T>;
  alignas(kVectorBytes) A partial[kTile] = {};
  for (Size pixel = 0; pixel < pixels; ++pixel)
    for_vectors<A>(width, [&](Size c, int n) {
      const Vec<A> term = gradients(first + pixel * stride + c, n, load_n(h + c, n));
      store(partial + c, load(partial + c) + term);
    });
  for (Size c = 0; c < width; ++c) totals[c] += partial[c];
}

template <class T>
void rows_backward(const ResidualGateBackward& args, const Gradients<T>& gradients) {
  using A = Compute<T>;
  const Size tiles = ceil_div(args.channels, kTile);
  parallel_for(args.threads, args.batch * tiles, [&](Size task) {
    const Size b = task / tiles, channel = task % tiles * kTile;
    const Size width = std::min(kTile, args.channels - channel);
    const Size first = b * args.channels + channel;
    double totals[kTile] = {};
    for (Size pixel = 0; pixel < args.area; pixel += kBlockPixels)
      add_rows(gradients, as<A>(args.h) + first, (b * args.area + pixel) * args.channels + channel,
               std::min(kBlockPixels, args.area - pixel), args.channels, width, totals);
    for (Size c = 0; c < width; ++c)
      as<A>(args.dh)[first + c] = static_cast<A>(totals[c]);
  });
}

template <class T>
void backward(const ResidualGateBackward& args) {
  const Gradients<T> gradients{as<T>(args.grad), as<T>(args.u), as<T>(args.out),
                               results<T>(args, args.du), results<T>(args, args.dshortcut)};
  in_rows(args) ? rows_backward(args, gradients) : planes_backward(args, gradients);
}

}  // namespace

void residual_gate_forward(const ResidualGateForward& args) {
  with_element_type(args.dtype, [&](auto element) { forward<decltype(element)>(args); });
}

void residual_gate_backward(const ResidualGateBackward& args) {
  with_element_type(args.dtype, [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace dla::DLA_ISA
