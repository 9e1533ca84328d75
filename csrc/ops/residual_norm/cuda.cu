// Bound by memory. Forward reads x for its moments (norm batch), then x and the shortcut, and
// writes out. Backward reads grad, out and x for their sums and writes dshortcut; then it reads
// dshortcut and x and writes dx. In between a small launch adds up the sums of pieces, in double.
#include "ops/residual_norm/op.h"

#include "common/cuda/norm.h"
#include "common/cuda/statistics.h"

namespace dla::cuda {
namespace residual_norm {

// ---- forward ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    join_kernel(Cut cut, const T* x, const T* shortcut, ChannelNorm<Compute<T>> norm, T* out) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const PackNorm<T> normed(norm, cut, part);
  for_packs<T, 2>(part, {x, shortcut}, [&](const Place& place, const Values<T, 2>& values) {
    A joined[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      const A sum = normed(values[0][e], e, values[1][e]);
      joined[e] = sum < A(0) ? A(0) : sum;  // NaN stays
    }
    store(out, place, joined);
  });
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient that passes the ReLU; per piece its sums, alone and with the centred x.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rectify_kernel(Cut cut, const T* grad, const T* out, const T* x, const Compute<T>* mean,
                   T* dshortcut, Compute<T>* alone, Compute<T>* with_x) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  A centre[kPack<T>];
  make_factors(cut, part, centre, [&](Size c) { return mean[c]; });
  Values<T, 2> sums = {};
  for_packs<T, 3>(part, {grad, out, x}, [&](const Place& place, const Values<T, 3>& values) {
    A passed[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      passed[e] = values[1][e] <= A(0) ? A(0) : values[0][e];
      sums[0][e] += passed[e];
      sums[1][e] += passed[e] * (values[2][e] - centre[e]);
    }
    store(dshortcut, place, passed);
  });
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    alone[piece_of(cut, plane)] = totals[0];
    with_x[piece_of(cut, plane)] = totals[1];
  });
}

// ---- host ---------------------------------------------------------------------------------------

template <class A>
ChannelNorm<A> norm_of(const ResidualNormInputs& args, const void* mean, const void* var) {
  return {static_cast<const A*>(args.weight), static_cast<const A*>(args.bias),
          static_cast<const A*>(mean), static_cast<const A*>(var), args.eps};
}

// For passes whose sums are wanted, and for the others.
template <class T>
Cut cut_sums(const ResidualNormInputs& args, std::initializer_list<const void*> maps) {
  return cut_pieces<T>(args.batch, args.channels, args.height * args.width, args.channels_last,
                       args.pieces, maps);
}

template <class T>
Cut cut_maps(const ResidualNormInputs& args, std::initializer_list<const void*> maps) {
  return cut_map<T>(args.batch, args.channels, args.height * args.width, args.channels_last, false,
                    maps);
}

Call call_of(const char* op, const ResidualNormInputs& args) {
  return {op, args.batch, args.channels, args.height * args.width, args.stream};
}

}  // namespace residual_norm

void residual_norm_forward(const ResidualNormForward& args) {
  using namespace residual_norm;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Compute<T>;
    const Call call = call_of("residual_norm", args);
    const T *x = static_cast<const T*>(args.x), *shortcut = static_cast<const T*>(args.shortcut);
    auto norm = norm_of<A>(args, args.mean_in, args.var_in);
    if (args.norm == Norm::batch) {
      A* means = static_cast<A*>(args.scratch);
      A* squares = means + args.batch * args.pieces * args.channels;
      A *mean = static_cast<A*>(args.mean), *var = static_cast<A*>(args.var);
      const Cut cut = cut_sums<T>(args, {x});
      launch(call, moments_kernel<T>, {cut.blocks, kThreads}, cut, x, means, squares);
      launch(call, statistics_kernel<A>, channel_grid(args.channels), cut, means, squares, mean, var);
      norm = norm_of<A>(args, mean, var);
    }
    const Cut cut = cut_maps<T>(args, {x, shortcut, args.out});
    launch(call, join_kernel<T>, {cut.blocks, kThreads}, cut, x, shortcut, norm,
           static_cast<T*>(args.out));
  });
}

void residual_norm_backward(const ResidualNormBackward& args) {
  using namespace residual_norm;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Compute<T>;
    const Call call = call_of("residual_norm_backward", args);
    const T *grad = static_cast<const T*>(args.grad), *out = static_cast<const T*>(args.out);
    const T* x = static_cast<const T*>(args.x);
    const auto norm = norm_of<A>(args, args.mean, args.var);
    T *dx = static_cast<T*>(args.dx), *dshortcut = static_cast<T*>(args.dshortcut);
    A* alone = static_cast<A*>(args.scratch);
    A* with_x = alone + args.batch * args.pieces * args.channels;
    A* scale = with_x + args.batch * args.pieces * args.channels;
    const Factors<A> factors{scale, scale + args.channels, scale + 2 * args.channels};
    const Cut summed = cut_sums<T>(args, {grad, out, x, dshortcut});
    launch(call, rectify_kernel<T>, {summed.blocks, kThreads}, summed, grad, out, x, norm.mean,
           dshortcut, alone, with_x);
    const double count = static_cast<double>(args.batch * args.height * args.width);
    launch(call, factors_kernel<A>, channel_grid(args.channels), piece_rows(summed), args.channels,
           count, alone, with_x, norm, args.norm == Norm::batch, factors,
           static_cast<A*>(args.dweight), static_cast<A*>(args.dbias));
    const Cut cut = cut_maps<T>(args, {dshortcut, x, dx});
    launch(call, norm_gradient_kernel<T>, {cut.blocks, kThreads}, cut, dshortcut, x, norm.mean,
           factors, dx);
  });
}

}  // namespace dla::cuda
