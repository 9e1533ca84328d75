// What ops with a norm by channel share: y = weight (x - mean) / sqrt(var + eps) + bias.
#pragma once

#include "common/cuda/statistics.h"

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

// dx = scale dy + of_x (x - mean) + added for y = norm(x), factors of a channel.
template <class A>
struct Factors {
  A *scale, *of_x, *added;
};

// Factors, and gradients of the norm's weight and bias, from sums of pieces: of dy, alone and with
// x - mean.
template <class A>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(Cut cut, const A* alone, const A* with_x, ChannelNorm<A> norm, bool of_batch,
                   Factors<A> factors, A* dweight, A* dbias) {
  const double sum = add_pieces(cut, [&](Size i, double) { return alone[i]; });
  const double sum_with_x = add_pieces(cut, [&](Size i, double) { return with_x[i]; });
  if (!writes_channel(cut)) return;
  const Size c = piece_channel();
  const double rstd = norm.rstd(c), scale = norm.scale(c);
  const double count = static_cast<double>(cut.planes / cut.channels * cut.area);
  factors.scale[c] = static_cast<A>(scale);
  factors.of_x[c] = static_cast<A>(of_batch ? -scale * rstd * rstd * sum_with_x / count : 0);
  factors.added[c] = static_cast<A>(of_batch ? -scale * sum / count : 0);
  if (dweight == nullptr) return;
  dweight[c] = static_cast<A>(rstd * sum_with_x);
  dbias[c] = static_cast<A>(sum);
}

}  // namespace dla::cuda
