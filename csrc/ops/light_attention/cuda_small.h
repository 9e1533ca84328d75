// The small part of light_attention on GPUs: kernels on arrays [batch, channels], between the
// passes over maps.
#pragma once

#include <cmath>

#include "ops/light_attention/cuda_passes.h"

namespace dla::cuda::light {

// Arrays [batch, channels]: the summary, or a table of sums over planes.
template <class A>
struct Fields {
  A* data;
  Size planes;

  DLA_HOST_DEVICE A* operator[](int field) const { return data + field * planes; }
};

// Where the sums of strips go in the forward pass: a table whose shifts are there already.
template <class A>
struct ToTable {
  double pixels;
  Fields<A> table;
  A *y, *pooled_p;  // means of x and p; the latter null: not wanted

  __device__ void put(int field, Size, Size i, double sum) const {
    table[field][i] = static_cast<A>(sum);
    if (field == kX) y[i] = static_cast<A>(sum / pixels);
    if (field == kP && pooled_p != nullptr)
      pooled_p[i] = static_cast<A>(table[kShiftP][i] + sum / pixels);
  }
};

// ---- scores -------------------------------------------------------------------------------------

// Filters over the channels of a sample, with zeros around these.
template <class A>
struct ScoreWeights {
  const A *q, *k;
  int taps, channels, head_dim;

  __device__ A filtered(const A* weight, const A* line, int c) const {
    const LineFilter<A> filter{weight, taps, channels};
    return filter.apply(c, [&](int from) { return line[from]; });
  }
  __device__ A transposed(const A* weight, const A* line, int c) const {
    const LineFilter<A> filter{weight, taps, channels};
    return filter.transposed(c, [&](int from) { return line[from]; });
  }
  __device__ A scale() const { return A(1) / std::sqrt(static_cast<A>(head_dim)); }
};

// a = sigmoid(q . k / sqrt(head_dim)) of every head, a warp each.
template <class A>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(Size heads, ScoreWeights<A> weights, const A* y, A* a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Size head = own_number() / kWarp;
  if (head >= heads) return;
  const Size row = head * weights.head_dim / weights.channels * weights.channels;
  const int first = static_cast<int>(head * weights.head_dim - row);
  A sum = 0;
  for (int c = first + lane; c < first + weights.head_dim; c += kWarp)
    sum += weights.filtered(weights.q, y + row, c) * weights.filtered(weights.k, y + row, c);
  const A score = A(1) / (A(1) + std::exp(-sum_lanes(sum, kWarp) * weights.scale()));
  for (int c = first + lane; c < first + weights.head_dim; c += kWarp) a[row + c] = score;
}

// The sum over all threads of a block, which all call it; thread 0 gets it.
template <class A>
__device__ inline A sum_block(A value) {
  constexpr int kWarps = kThreads / kWarp;
  DLA_SHARED(A, of_warps, kWarps);
  const int thread = static_cast<int>(threadIdx.x);
  value = sum_lanes(value, kWarp);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = value;
  __syncthreads();
  for (int w = 1; w < kWarps && thread == 0; ++w) value += of_warps[w];
  __syncthreads();  // it may be called again
  return value;
}

// Backward of the scores, a block for a sample. dy is what reaches y from da and from the cell
// (null: nothing). Leaves the sample's share in the filters' gradients, [2, batch, taps]. grads
// [2, batch, channels] is working memory: of queries and keys.
template <class A>
__global__ void __launch_bounds__(kThreads)
    score_gradients_kernel(Size batch, ScoreWeights<A> weights, const A* y, const A* a, const A* da,
                           const A* of_cell, A* grads, A* dy, A* dfilters) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int channels = weights.channels, head_dim = weights.head_dim, taps = weights.taps;
  const Size row = static_cast<Size>(blockIdx.x) * channels;
  const A* line = y + row;
  A *grad_query = grads + row, *grad_key = grad_query + batch * channels;
  for (int head = thread / kWarp * head_dim; head < channels;
       head += kThreads / kWarp * head_dim) {
    A sum = 0;
    for (int c = head + lane; c < head + head_dim; c += kWarp) sum += da[row + c];
    const A score = a[row + head];
    const A dscore = sum_lanes(sum, kWarp) * score * (A(1) - score) * weights.scale();
    for (int c = head + lane; c < head + head_dim; c += kWarp) {
      grad_query[c] = dscore * weights.filtered(weights.k, line, c);
      grad_key[c] = dscore * weights.filtered(weights.q, line, c);
    }
  }
  __syncthreads();
  for (int c = thread; c < channels; c += kThreads)
    dy[row + c] = (of_cell == nullptr ? A(0) : of_cell[row + c]) +
                  weights.transposed(weights.q, grad_query, c) +
                  weights.transposed(weights.k, grad_key, c);
  for (int t = 0; t < 2 * taps; ++t) {
    const int filter = t / taps, tap = t % taps, shift = tap - taps / 2;
    const A* grad = filter == 0 ? grad_query : grad_key;
    A sum = 0;
    for (int c = thread; c < channels; c += kThreads)
      if (c + shift >= 0 && c + shift < channels) sum += grad[c] * line[c + shift];
    sum = sum_block(sum);
    if (thread == 0) dfilters[(filter * batch + blockIdx.x) * taps + tap] = sum;
  }
}

// Where the sums of these shares go.
template <class A>
struct FilterGradients {
  A *q, *k;

  __device__ void put(int filter, Size, Size tap, double sum) const {
    (filter == 0 ? q : k)[tap] = static_cast<A>(sum);
  }
};

// ---- gates --------------------------------------------------------------------------------------

// d from the cell's output; without (null) there is no gate, nor a pooled p.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gates_kernel(Size planes, const A* output, bool sigmoid, A* d, A* pooled_p) {
  const Size i = own_number();
  if (i >= planes) return;
  if (output == nullptr) {
    d[i] = A(1);
    pooled_p[i] = A(0);
  } else {
    d[i] = sigmoid ? A(1) / (A(1) + std::exp(-output[i])) : output[i];
  }
}

// ---- statistics and gradients of channels -------------------------------------------------------

// The numbers of a plane.
template <class A>
struct PlaneNumbers {
  Fields<const A> fields;
  Size i;

  DLA_HOST_DEVICE double operator()(int field) const { return fields[field][i]; }
};

// The planes of the thread's channel.
template <class A>
struct Planes {
  Size batch, channels;
  double pixels;
  Fields<const A> table, summary;
  const A* lam;

  __device__ MixtureOfO<double> mixture(Size i) const {
    return {summary[kAttention][i], summary[kGate][i], lam[own_channel(channels)]};
  }
  __device__ auto of_o(Size i) const {
    return PlaneOfO{PlaneNumbers<A>{table, i}, pixels, mixture(i)};
  }
  __device__ auto of_gradient(Size i) const {
    const auto kept = [this, i](int field) -> double { return summary[field][i]; };
    return PlaneOfGradient{PlaneNumbers<A>{table, i}, kept, pixels, mixture(i)};
  }
  __device__ double count() const { return static_cast<double>(batch) * pixels; }
  // Mean over the batch of what `plane` gives. All threads of the block call it.
  template <class Plane>
  __device__ double mean(const Plane& plane) const {
    return add_rows(batch, channels, [&](Size, Size i) { return plane(i); }) /
           static_cast<double>(batch);
  }
};

// Mean and variance of o over batch and space; and what the summary has for backward.
template <class A>
__global__ void __launch_bounds__(kThreads)
    output_statistics_kernel(Planes<A> planes, Fields<A> summary, A* mean, A* var) {
  const Size channels = planes.channels;
  const double centre = planes.mean([&](Size i) { return planes.of_o(i).mean(); });
  const double square = add_rows(planes.batch, channels, [&](Size, Size i) {
    const auto plane = planes.of_o(i);
    const double variance = plane.for_maps([&](int f, double of_map, double with_o) {
      const A rounded = summary[mean_of_map(f)][i] = static_cast<A>(of_map);
      summary[kRestU + f][i] = static_cast<A>(of_map - rounded);
      summary[kCovarianceU + f][i] = static_cast<A>(with_o);
    });
    const double off = plane.mean() - centre;
    return planes.pixels * ((variance < 0 ? 0 : variance) + off * off);
  });
  if (!writes_channel(channels)) return;
  mean[own_channel(channels)] = static_cast<A>(centre);
  var[own_channel(channels)] = static_cast<A>(square / planes.count());
}

// What channel_gradients_kernel finds.
template <class A>
struct ChannelGradients {
  A *out_scale, *da;                    // [batch, channels]
  A* dgate;                             // [slots, batch, channels], of the cell; may be null
  int slots;
  A *mean, *slope, *level;              // [channels], for GradientFactors
  A *dlam, *dnorm_weight, *dnorm_bias;  // [channels]; the last two may be null

  // The gate is slot 0.
  __device__ void put_gate(Size planes, Size i, double gradient) const {
    if (dgate == nullptr) return;
    dgate[i] = static_cast<A>(gradient);
    for (int slot = 1; slot < slots; ++slot) dgate[slot * planes + i] = 0;
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    channel_gradients_kernel(Planes<A> planes, OutputNorm<A> end, bool of_batch, bool sigmoid_gate,
                             ChannelGradients<A> to) {
  const Size channels = planes.channels, c = own_channel(channels);
  const bool exists = c < channels;
  const double rstd = exists ? end.norm.rstd(c) : 1;
  const double weight = exists ? end.norm.scale(c, rstd) : 1;
  // Of the batch: that of the shifts, which are the means of the planes. Not the mean that was
  // rounded: it is multiplied by sums of gradients over whole planes.
  const auto mean_of_plane = [&](Size i) { return planes.of_gradient(i).mean(); };
  const double mean = of_batch ? planes.mean(mean_of_plane) : exists ? end.norm.centre(c) : 0;
  GradientOfO<double> g{weight, mean};
  const double dweight = rstd * add_rows(planes.batch, channels, [&](Size b, Size i) {
    return end.drop(b) * planes.of_gradient(i).with_out(mean);
  });
  const double dbias = add_rows(planes.batch, channels, [&](Size b, Size i) {
    return end.drop(b) * planes.table[kG][i];
  });
  if (of_batch) g.pass_norm(rstd, dweight, dbias, planes.count());
  const double dlam = add_rows(planes.batch, channels, [&](Size b, Size i) {
    const auto plane = planes.of_gradient(i);
    const double out_scale = weight * end.drop(b), d = planes.summary[kGate][i];
    const auto found = of_batch ? plane.template with_g<true>(g, out_scale)
                                : plane.template with_g<false>(g, out_scale);
    to.out_scale[i] = static_cast<A>(out_scale);
    to.da[i] = static_cast<A>(found.u);
    const double dd = plane.mixture.lam * found.p;
    to.put_gate(planes.batch * channels, i, sigmoid_gate ? dd * d * (1 - d) : dd);
    return d * found.p + found.e;
  });
  if (!writes_channel(channels)) return;
  to.mean[c] = static_cast<A>(g.mean);
  to.slope[c] = static_cast<A>(g.slope);
  to.level[c] = static_cast<A>(g.level);
  to.dlam[c] = static_cast<A>(dlam);
  if (to.dnorm_weight != nullptr) to.dnorm_weight[c] = static_cast<A>(dweight);
  if (to.dnorm_bias != nullptr) to.dnorm_bias[c] = static_cast<A>(dbias);
}

}  // namespace dla::cuda::light
