// The gradient of x where batch norm(x) was taken, from that of the norm's result and its sums.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

// Of every channel; weight and bias null: 1 and 0.
template <class A>
struct ChannelNorm {
  const A *weight, *bias, *mean, *var;
  double eps;

  __device__ double rstd(Size c) const { return 1 / std::sqrt(var[c] + eps); }
  __device__ double scale(Size c) const {
    return weight == nullptr ? rstd(c) : weight[c] * rstd(c);
  }
};

// dx = scale grad + of_x (x - mean) + added, factors of a channel.
template <class A>
struct Factors {
  A *scale, *of_x, *added;
};

// Sums of a gradient over pieces of planes, [rows, channels], alone and with the centred x: the
// gradients of the norm's weight and bias (null: not wanted), and the factors. `count` values of a
// channel; with statistics `of_batch` all of them move mean and variance.
template <class A>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(Size rows, Size channels, double count, const A* alone, const A* with_x,
                   ChannelNorm<A> norm, bool of_batch, Factors<A> factors, A* dweight, A* dbias) {
  const double sum = add_rows(rows, channels, [&](Size, Size i) { return alone[i]; });
  const double sum_with_x = add_rows(rows, channels, [&](Size, Size i) { return with_x[i]; });
  if (!writes_channel(channels)) return;
  const Size c = own_channel(channels);
  const double rstd = norm.rstd(c), scale = norm.scale(c);
  factors.scale[c] = static_cast<A>(scale);
  factors.of_x[c] = static_cast<A>(of_batch ? -scale * rstd * rstd * sum_with_x / count : 0);
  factors.added[c] = static_cast<A>(of_batch ? -scale * sum / count : 0);
  if (dweight == nullptr) return;
  dweight[c] = static_cast<A>(rstd * sum_with_x);
  dbias[c] = static_cast<A>(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_gradient_kernel(Cut cut, const T* grad, const T* x, const Compute<T>* mean,
                         Factors<Compute<T>> factors, T* dx) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  A centre[kPack<T>], scale[kPack<T>], of_x[kPack<T>], added[kPack<T>];
  make_factors(cut, part, centre, [&](Size c) { return mean[c]; });
  make_factors(cut, part, scale, [&](Size c) { return factors.scale[c]; });
  make_factors(cut, part, of_x, [&](Size c) { return factors.of_x[c]; });
  make_factors(cut, part, added, [&](Size c) { return factors.added[c]; });
  for_packs<T, 2>(part, {grad, x}, [&](const Place& place, const Values<T, 2>& values) {
    A found[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e)
      found[e] = scale[e] * values[0][e] + (of_x[e] * (values[1][e] - centre[e]) + added[e]);
    store(dx, place, found);
  });
}

}  // namespace dla::cuda
