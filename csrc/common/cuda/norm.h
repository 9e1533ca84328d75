// Norms by channel: their factors for passes over maps, and the gradient of x where batch norm(x)
// was taken, from that of the norm's result and its sums.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

// (x - mean) / sqrt(var + eps) * weight + bias; weight and bias null: 1 and 0. Mean and variance
// null: as if these were 0 and 1, and eps 0.
template <class A>
struct ChannelNorm {
  const A *weight, *bias, *mean, *var;
  double eps;

  __device__ double rstd(Size c) const { return var == nullptr ? 1 : 1 / std::sqrt(var[c] + eps); }
  __device__ double scale(Size c, double rstd) const {
    return weight == nullptr ? rstd : weight[c] * rstd;
  }
  // (x - centre) factor + shift, in the type that maps are computed in.
  __device__ A centre(Size c) const { return value_or_zero(mean, c); }
  __device__ A factor(Size c) const {
    const A rstd = var == nullptr ? A(1) : inverse_sqrt(var[c] + static_cast<A>(eps));
    return weight == nullptr ? rstd : rstd * weight[c];
  }
  __device__ A shift(Size c) const { return value_or_zero(bias, c); }
};

// The same of the elements of a thread's packs.
template <class T>
struct PackNorm {
  using A = Compute<T>;
  A centre[kPack<T>], factor[kPack<T>], shift[kPack<T>];

  __device__ PackNorm(const ChannelNorm<A>& norm, const Cut& cut, const Part<T>& part) {
    make_factors(cut, part, centre, [&](Size c) { return norm.centre(c); });
    make_factors(cut, part, factor, [&](Size c) { return norm.factor(c); });
    make_factors(cut, part, shift, [&](Size c) { return norm.shift(c); });
  }
  // Of element e, with `other` added.
  __device__ A operator()(A x, int e, A other = 0) const {
    return (x - centre[e]) * factor[e] + (shift[e] + other);
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
  const double rstd = norm.rstd(c), scale = norm.scale(c, rstd);
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
