// Bound by memory: forward reads x and writes out, backward reads grad and x once and writes dx.
// Feature after feature, each divided among all threads, without a barrier in between.
#include "ops/gate/op.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {
namespace {

// Products are summed in the compute type within a block and in double over the blocks.
constexpr Size kBlock = 1024;        // elements of a plane (NCHW)
constexpr Size kGroup = 8;           // pixels whose sum stays in a register (channels_last)
constexpr Size kGroups = 32;         // groups in a block (channels_last)
constexpr Size kTile = 256;          // channels of one task, at most (channels_last)
constexpr Size kTaskElements = 8192;  // of one forward task, about

// One feature and its gates; T is the feature type.
template <class T>
struct GatedFeature {
  const T* x;
  const Compute<T>* gates;
  Size batch, channels, area;
  bool rows;  // pixels are rows of channels: channels_last

  GatedFeature(const GateShapes& shapes, const void* x, const void* gates, std::size_t i)
      : x(as<T>(x)),
        gates(as<Compute<T>>(gates)),
        batch(shapes.batch[i]),
        channels(shapes.channels[i]),
        area(shapes.area[i]),
        rows(shapes.channels_last[i] != 0 || area == 1) {}

  Results<T> results(T* data) const {
    return {data, batch * channels * area, rows ? channels : area};
  }
};

// Iterations among the threads of the enclosing parallel region.
template <class Body>
void share(Size count, Body&& body) {
#pragma omp for schedule(static) nowait
  for (Size i = 0; i < count; ++i) body(i);
}

// ---- forward ------------------------------------------------------------------------------------

template <class T>
void scale_planes(const GatedFeature<T>& f, const Results<T>& out) {
  using A = Compute<T>;
  share(f.batch * f.channels, [&](Size plane) {
    const Size first = plane * f.area;
    const Vec<A> d = splat<A>(f.gates[plane]);
    for_vectors<A>(f.area,
                   [&](Size i, int n) { out.put(first + i, load_n(f.x + first + i, n) * d, n); });
  });
}

template <class T>
void scale_rows(const GatedFeature<T>& f, const Results<T>& out) {
  using A = Compute<T>;
  const Size per_task = std::max<Size>(1, kTaskElements / f.channels);
  const Size tasks = ceil_div(f.area, per_task);  // of a sample
  share(f.batch * tasks, [&](Size task) {
    const Size b = task / tasks, first = task % tasks * per_task;
    const Size last = std::min(f.area, first + per_task);
    const A* d = f.gates + b * f.channels;
    for (Size pixel = b * f.area + first; pixel < b * f.area + last; ++pixel) {
      const Size at = pixel * f.channels;
      for_vectors<A>(f.channels, [&](Size c, int n) {
        out.put(at + c, load_n(f.x + at + c, n) * load_n(d + c, n), n);
      });
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// `count` elements of a plane from `first` on: writes dx and returns sum grad * x.
template <class T>
Compute<T> plane_block(const T* grad, const T* x, Vec<Compute<T>> d, Size first, Size count,
                       const Results<T>& dx) {
  using A = Compute<T>;
  constexpr int chains = 4;
  Vec<A> sums[chains] = {};
  const auto step = [&](Size i, int n, Vec<A>& total) {
    const Vec<A> g = load_n(grad + first + i, n);
    total += g * load_n(x + first + i, n);
    dx.put(first + i, g * d, n);
  };
  Size i = 0;
  for (; i + chains * kLanes<A> <= count; i += chains * kLanes<A>)
    for (int j = 0; j < chains; ++j) step(i + j * kLanes<A>, kLanes<A>, sums[j]);
  for_vectors<A>(count - i, [&](Size rest, int n) { step(i + rest, n, sums[0]); });
  return sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void planes_backward(const GatedFeature<T>& f, const T* grad, const Results<T>& dx,
                     Compute<T>* dgates) {
  using A = Compute<T>;
  share(f.batch * f.channels, [&](Size plane) {
    const Size start = plane * f.area;
    const Vec<A> d = splat<A>(f.gates[plane]);
    double total = 0;
    for (Size i = start; i < start + f.area; i += kBlock)
      total += plane_block(grad, f.x, d, i, std::min(kBlock, start + f.area - i), dx);
    dgates[plane] = static_cast<A>(total);
  });
}

// `pixels` rows of a tile of `width` channels, from element `first` on: writes dx, adds
// grad * x to partial.
template <class T>
void row_group(const T* grad, const T* x, const Compute<T>* d, Size first, Size stride, Size pixels,
               Size width, const Results<T>& dx, Compute<T>* partial) {
  using A = Compute<T>;
  for_vectors<A>(width, [&](Size c, int n) {
    const Vec<A> factor = load_n(d + c, n);
    Vec<A> total = {};
    for (Size pixel = 0; pixel < pixels; ++pixel) {
      const Size at = first + pixel * stride + c;
      const Vec<A> g = load_n(grad + at, n);
      total += g * load_n(x + at, n);
      dx.put(at, g * factor, n);
    }
    store(partial + c, load(partial + c) + total);
  });
}

template <class T>
void rows_backward(const GatedFeature<T>& f, const T* grad, const Results<T>& dx, Compute<T>* dgates,
                   int threads) {
  using A = Compute<T>;
  // Narrower tiles where the batch alone cannot occupy the threads; a channel's sum is the same
  // in any tile.
  Size tile = kTile;
  while (tile > 32 && f.batch * ceil_div(f.channels, tile) < threads) tile /= 2;
  const Size tiles = ceil_div(f.channels, tile);
  share(f.batch * tiles, [&](Size task) {
    const Size b = task / tiles, first = task % tiles * tile;
    const Size width = std::min(tile, f.channels - first);
    const A* d = f.gates + b * f.channels + first;
    double totals[kTile] = {};
    for (Size block = 0; block < f.area; block += kGroup * kGroups) {
      alignas(kVectorBytes) A partial[kTile] = {};
      const Size end = std::min(f.area, block + kGroup * kGroups);
      for (Size pixel = block; pixel < end; pixel += kGroup) {
        const Size at = (b * f.area + pixel) * f.channels + first;
        row_group(grad, f.x, d, at, f.channels, std::min(kGroup, end - pixel), width, dx, partial);
      }
      for (Size c = 0; c < width; ++c) totals[c] += partial[c];
    }
    for (Size c = 0; c < width; ++c)
      dgates[b * f.channels + first + c] = static_cast<A>(totals[c]);
  });
}

// Calls body(i, T{}) for every feature i on every thread, T the type of all features.
template <class Body>
void for_features(const GateShapes& shapes, Body&& body) {
  with_element_type(shapes.dtype, [&](auto element) {
#pragma omp parallel num_threads(shapes.threads)
    {
      for (std::size_t i = 0; i < shapes.area.size(); ++i) body(i, element);
      end_streams();
    }
  });
}

}  // namespace

void gate_forward(const GateForward& args) {
  for_features(args, [&](std::size_t i, auto element) {
    using T = decltype(element);
    const GatedFeature<T> f(args, args.x[i], args.gates[i], i);
    const Results<T> out = f.results(as<T>(args.out[i]));
    f.rows ? scale_rows(f, out) : scale_planes(f, out);
  });
}

void gate_backward(const GateBackward& args) {
  for_features(args, [&](std::size_t i, auto element) {
    using T = decltype(element);
    const GatedFeature<T> f(args, args.x[i], args.gates[i], i);
    const T* grad = as<T>(args.grad[i]);
    const Results<T> dx = f.results(as<T>(args.dx[i]));
    auto* dgates = as<Compute<T>>(args.dgates[i]);
    if (f.rows) {
      rows_backward(f, grad, dx, dgates, args.threads);
    } else {
      planes_backward(f, grad, dx, dgates);
    }
  });
}

}  // namespace dla::DLA_ISA
