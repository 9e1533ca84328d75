// The part of base_attention that works on [B, C] numbers only, on GPUs: keys and gates of earlier
// layers, attention scores, and the gradients of all this. memory.h is the same for CPUs.
#pragma once

#include <cmath>

#include "common/cuda/attention_step.h"
#include "ops/base_attention/op.h"

namespace dla::cuda::base {

constexpr int kMostLayers = 63;  // before the own one

// What earlier layers left, and what scores are made with.
template <class A>
struct Memory {
  int layers, batch, channels, head_dim, taps;
  bool dynamic, features, sigmoid, first_sample;
  const A *y, *keys, *gates;      // [B, C], [T, B, C]
  const A *q_weight, *k_weight;   // [taps]
  const A *pooled[kMostLayers];   // [B, C]
  const A *key_weights[kMostLayers];

  DLA_HOST_DEVICE Size planes() const { return static_cast<Size>(batch) * channels; }
  DLA_HOST_DEVICE int heads() const { return channels / head_dim; }
  DLA_HOST_DEVICE bool gates_keys() const { return dynamic && !features; }
  // Rows that the cell makes factors of: those of gates, then those of keys, [T, B] each.
  DLA_HOST_DEVICE Size rows() const {
    return dynamic ? (gates_keys() ? 2 : 1) * static_cast<Size>(layers) * batch : 0;
  }
  DLA_HOST_DEVICE Size earlier() const { return layers * planes(); }

  // Element c of a filter along channels, of which element c is line(c); and of its transpose.
  template <class Line>
  __device__ A filtered(const A* weight, int c, const Line& line) const {
    return LineFilter<A>{weight, taps, channels}.apply(c, line);
  }
  template <class Line>
  __device__ A transposed(const A* weight, int c, const Line& line) const {
    return LineFilter<A>{weight, taps, channels}.transposed(c, line);
  }
  __device__ A query(int b, int c) const {
    const A* line = y + static_cast<Size>(b) * channels;
    return filtered(q_weight, c, [&](int from) { return line[from]; });
  }
};

// Keys and gates of T + 1 layers, [T + 1, B, C]; gates may be null: all 1.
template <class A>
struct Recall {
  A *keys, *gates;
};

// Element i of [layers, B, C].
struct Element {
  int t, b, c;
  Size plane;  // number in [B, C]

  template <class A>
  __device__ Element(const Memory<A>& memory, Size i)
      : t(static_cast<int>(i / memory.planes())), plane(i % memory.planes()) {
    b = static_cast<int>(plane / memory.channels);
    c = static_cast<int>(plane % memory.channels);
  }
};

// ---- forward ------------------------------------------------------------------------------------

// What the cell makes factors of, [rows, C], and the state once for every row, [slots, rows, C].
template <class A>
__global__ void __launch_bounds__(kThreads)
    cell_inputs_kernel(const __grid_constant__ Memory<A> memory, int slots, const A* state,
                       A* inputs, A* repeated_state) {
  const Size i = own_number(), size = memory.rows() * memory.channels;
  if (i >= size) return;
  const Element at(memory, i);
  inputs[i] = at.t < memory.layers ? memory.gates[i] * memory.pooled[at.t][at.plane]
                                   : memory.keys[i - memory.earlier()];
  const Size own = memory.first_sample ? at.c : at.plane;
  for (int slot = 0; slot < slots; ++slot)
    repeated_state[slot * size + i] = state[slot * memory.planes() + own];
}

template <class A>
__device__ inline A factor_of(const Memory<A>& memory, const A* outputs, Size i) {
  return memory.sigmoid ? A(1) / (A(1) + std::exp(-outputs[i])) : outputs[i];
}

// Keys and gates of all layers. outputs: of the cell, [rows, C].
template <class A>
__global__ void __launch_bounds__(kThreads)
    recall_kernel(const __grid_constant__ Memory<A> memory, const A* outputs, Recall<A> to) {
  const Size i = own_number();
  if (i >= memory.earlier() + memory.planes()) return;
  const Element at(memory, i);
  const auto gate = [&](Size row) { return memory.gates[row] * factor_of(memory, outputs, row); };
  const Size first = i - at.c;  // of the row of channels
  if (to.gates != nullptr) to.gates[i] = at.t == memory.layers ? A(1) : gate(i);
  if (at.t == memory.layers) {
    const A* line = memory.y + at.plane - at.c;
    to.keys[i] = memory.filtered(memory.k_weight, at.c, [&](int from) { return line[from]; });
  } else if (memory.features) {
    const A* means = memory.pooled[at.t] + at.plane - at.c;
    to.keys[i] = memory.filtered(memory.key_weights[at.t], at.c, [&](int from) {
      return gate(first + from) * means[from];
    });
  } else {
    const A key = memory.keys[i];
    to.keys[i] = memory.dynamic ? key * factor_of(memory, outputs, memory.earlier() + i) : key;
  }
}

// A head of a sample, to which a warp is given: its lanes take the channels.
struct Head {
  Size number;
  int lane, b, first, last;
  bool exists;

  template <class A>
  __device__ explicit Head(const Memory<A>& memory)
      : number(own_number() / kWarp), lane(static_cast<int>(threadIdx.x) % kWarp) {
    b = static_cast<int>(number / memory.heads());
    first = static_cast<int>(number % memory.heads()) * memory.head_dim;
    last = first + memory.head_dim;
    exists = b < memory.batch;
  }
  // The sum of value(c), in all lanes.
  template <class Value>
  __device__ double sum(const Value& value) const {
    double found = 0;
    for (int c = first + lane; c < last; c += kWarp) found += value(c);
    return sum_lanes(found, kWarp);
  }
};

// A number for each of up to 64 layers, shared out among the lanes of a warp.
struct OfLayers {
  static constexpr int kSlots = (kMostLayers + kWarp) / kWarp;
  double slot[kSlots] = {};

  __device__ void set(int lane, int t, double value) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (t == lane + i * kWarp) slot[i] = value;
  }
  // Calls body(t, number) for this lane's, t < count.
  template <class Body>
  __device__ void each(int lane, int count, const Body& body) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + i * kWarp < count) body(lane + i * kWarp, slot[i]);
  }
};

// Softmax over the layers of q . K_t / sqrt(head_dim), [T + 1, B, heads].
template <class A>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(const __grid_constant__ Memory<A> memory, const A* keys, A* scores) {
  const Head head(memory);
  if (!head.exists) return;
  const int count = memory.layers + 1;
  const double scale = 1 / std::sqrt(static_cast<double>(memory.head_dim));
  OfLayers logits;
  double most = -INFINITY, total = 0;
  for (int t = 0; t < count; ++t) {
    const A* line = keys + t * memory.planes() + static_cast<Size>(head.b) * memory.channels;
    const double logit = scale * head.sum([&](int c) {
      return static_cast<double>(memory.query(head.b, c)) * line[c];
    });
    logits.set(head.lane, t, logit);
    if (!(logit <= most)) most = logit;
  }
  logits.each(head.lane, count, [&](int, double& logit) {
    logit = std::exp(logit - most);
    total += logit;
  });
  total = sum_lanes(total, kWarp);
  const Size heads = static_cast<Size>(memory.batch) * memory.heads();
  logits.each(head.lane, count, [&](int t, double& logit) {
    scores[t * heads + head.number] = static_cast<A>(logit / total);
  });
}

// The score of a layer for the head of an element.
template <class A>
__device__ inline A score_of(const Memory<A>& memory, const A* scores, const Element& at) {
  return scores[(static_cast<Size>(at.t) * memory.batch + at.b) * memory.heads() +
                at.c / memory.head_dim];
}

// The factors of the values: scores times gates, [T + 1, B, C].
template <class A>
__global__ void __launch_bounds__(kThreads)
    weigh_kernel(const __grid_constant__ Memory<A> memory, const A* scores, const A* gates,
                 A* weights) {
  const Size i = own_number();
  if (i >= memory.earlier() + memory.planes()) return;
  const A score = score_of(memory, scores, Element(memory, i));
  weights[i] = gates == nullptr ? score : score * gates[i];
}

// ---- backward -----------------------------------------------------------------------------------

// Gradients of q . K_t / sqrt(head_dim), from those of the values' factors: [T + 1, B, heads].
template <class A>
__global__ void __launch_bounds__(kThreads)
    logit_gradients_kernel(const __grid_constant__ Memory<A> memory, const A* scores,
                           const A* gates, const A* dweights, A* dlogits) {
  const Head head(memory);
  if (!head.exists) return;
  const int count = memory.layers + 1;
  const Size heads = static_cast<Size>(memory.batch) * memory.heads();
  OfLayers grads;
  for (int t = 0; t < count; ++t) {
    const Size row = t * memory.planes() + static_cast<Size>(head.b) * memory.channels;
    grads.set(head.lane, t, head.sum([&](int c) {
      const double grad = value_or_zero(dweights, row + c);
      return gates == nullptr ? grad : grad * gates[row + c];
    }));
  }
  double mean = 0;
  grads.each(head.lane, count, [&](int t, double& grad) {
    mean += grad * scores[t * heads + head.number];
  });
  mean = sum_lanes(mean, kWarp);
  const double scale = 1 / std::sqrt(static_cast<double>(memory.head_dim));
  grads.each(head.lane, count, [&](int t, double& grad) {
    const Size i = t * heads + head.number;
    dlogits[i] = static_cast<A>(scale * (grad - mean) * scores[i]);
  });
}

// Those of queries [B, C], and of keys and gates of all layers. arriving: gradients of the latter
// from elsewhere, which may be null.
template <class A>
__global__ void __launch_bounds__(kThreads)
    recall_gradients_kernel(const __grid_constant__ Memory<A> memory, const A* scores,
                            const A* dlogits, const A* keys, const A* dweights,
                            Recall<const A> arriving, A* dqueries, Recall<A> to) {
  const Size plane = own_number(), size = memory.planes();
  if (plane >= size) return;
  const Element own(memory, plane);
  const A query = memory.query(own.b, own.c);
  A dquery = 0;
  for (int t = 0; t <= memory.layers; ++t) {
    const Size i = t * size + plane;
    const Element at(memory, i);
    const A dlogit = score_of(memory, dlogits, at);
    dquery += dlogit * keys[i];
    to.keys[i] = dlogit * query + value_or_zero(arriving.keys, i);
    to.gates[i] = value_or_zero(dweights, i) * score_of(memory, scores, at) +
                  value_or_zero(arriving.gates, i);
  }
  dqueries[plane] = dquery;
}

// Where the gradients of what earlier layers left go.
template <class A>
struct MemoryGradients {
  A *keys, *gates;         // [T, B, C]; null where there are none
  A *pooled[kMostLayers];  // [B, C]
};

// Through K' = K d and G' = G d (or K' made of G'), d = gate(u): what reaches the inputs directly,
// and the gradients of the cell's outputs; those of its other slots are 0.
template <class A>
__global__ void __launch_bounds__(kThreads)
    factor_gradients_kernel(const __grid_constant__ Memory<A> memory, int slots, const A* outputs,
                            Recall<A> of, Recall<A> grads,
                            const __grid_constant__ MemoryGradients<A> to, A* doutputs) {
  const Size i = own_number();
  if (i >= memory.earlier()) return;
  const Element at(memory, i);
  if (!memory.dynamic) {
    to.keys[i] = grads.keys[i];
    return;
  }
  const Size size = memory.rows() * memory.channels;
  const auto through_product = [&](A old, A grad, A* dold, Size row) {
    const A factor = factor_of(memory, outputs, row);
    dold[i] = grad * factor;
    const A of_factor = grad * old;
    doutputs[row] = memory.sigmoid ? of_factor * factor * (A(1) - factor) : of_factor;
    for (int slot = 1; slot < slots; ++slot) doutputs[slot * size + row] = A(0);
  };
  A dgate = grads.gates[i], dpooled = 0;
  if (memory.features) {
    const A* line = grads.keys + i - at.c;
    const A dmean = memory.transposed(memory.key_weights[at.t], at.c,
                                      [&](int from) { return line[from]; });
    dgate += dmean * memory.pooled[at.t][at.plane];
    dpooled = dmean * of.gates[i];
  } else {
    through_product(memory.keys[i], grads.keys[i], to.keys, memory.earlier() + i);
  }
  to.pooled[at.t][at.plane] = dpooled;
  through_product(memory.gates[i], dgate, to.gates, i);
}

// What the cell's inputs [rows, C] pass on to what they were made from.
template <class A>
__global__ void __launch_bounds__(kThreads)
    input_gradients_kernel(const __grid_constant__ Memory<A> memory, const A* dinputs,
                           const __grid_constant__ MemoryGradients<A> to) {
  const Size i = own_number();
  if (i >= memory.earlier()) return;
  const Element at(memory, i);
  to.gates[i] += dinputs[i] * memory.pooled[at.t][at.plane];
  to.pooled[at.t][at.plane] += dinputs[i] * memory.gates[i];
  if (memory.gates_keys()) to.keys[i] += dinputs[memory.earlier() + i];
}

// dy, the gradient of the mean of x: what arrives there, what comes from the cell (both may be
// null), and what query and own key pass on.
template <class A>
__global__ void __launch_bounds__(kThreads)
    pooled_gradients_kernel(const __grid_constant__ Memory<A> memory, const A* arriving,
                            const A* of_cell, const A* dqueries, const A* dkeys, A* dy) {
  const Size plane = own_number();
  if (plane >= memory.planes()) return;
  const Element at(memory, plane);
  const A *queries = dqueries + plane - at.c, *keys = dkeys + memory.earlier() + plane - at.c;
  dy[plane] =
      value_or_zero(arriving, plane) + value_or_zero(of_cell, plane) +
      memory.transposed(memory.q_weight, at.c, [&](int from) { return queries[from]; }) +
      memory.transposed(memory.k_weight, at.c, [&](int from) { return keys[from]; });
}

// Gradients of the filters along channels: of queries, own keys, and with gated features of the
// earlier keys.
constexpr int kQuery = 0, kOwnKey = 1, kEarlierKeys = 2;

template <class A>
struct FilterGradients {
  A* of[kEarlierKeys + kMostLayers];

  __device__ void put(int filter, Size, Size tap, double sum) const {
    of[filter][tap] = static_cast<A>(sum);
  }
};

// The share of a sample, [filters, B, taps], from a warp.
template <class A>
__global__ void __launch_bounds__(kThreads)
    filter_sums_kernel(const __grid_constant__ Memory<A> memory, int filters, const A* gates,
                       const A* dqueries, const A* dkeys, A* sums) {
  const Size number = own_number() / kWarp;
  const int filter = static_cast<int>(number / memory.batch);
  if (filter >= filters) return;
  const Size row = number % memory.batch * memory.channels;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, t = filter - kEarlierKeys;
  const Size key_row = (t < 0 ? memory.earlier() : t * memory.planes()) + row;
  const A* grads = filter == kQuery ? dqueries + row : dkeys + key_row;
  const auto line = [&](int c) {
    return t < 0 ? memory.y[row + c] : gates[key_row + c] * memory.pooled[t][row + c];
  };
  for (int tap = 0; tap < memory.taps; ++tap) {
    A sum = 0;
    for (int c = lane; c < memory.channels; c += kWarp) {
      const int from = c + tap - memory.taps / 2;
      if (from >= 0 && from < memory.channels) sum += grads[c] * line(from);
    }
    sum = sum_lanes(sum, kWarp);
    if (lane == 0) sums[number * memory.taps + tap] = sum;
  }
}

}  // namespace dla::cuda::base
