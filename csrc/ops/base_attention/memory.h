// The part of base_attention that works on [B, C] numbers only: what earlier layers left in memory
// (keys, gates, means of their values) goes through the gates, attention scores are taken, and the
// gradients of all this.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/channel_filter.h"
#include "common/map.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vmath.h"
#include "ops/base_attention/op.h"
#include "ops/cell/cell.h"

namespace dla::DLA_ISA {

template <class A>
struct LayerMemory;

// What a layer makes of the memory, or the gradients of that: keys and gates of T + 1 layers, and
// what the new factors of the T earlier ones' gates and keys were made from. These factors come from
// one evaluation of the cell on all rows, with the state repeated for each layer.
template <class A>
struct Recall {
  A* state;                        // [S, B, C]
  A *keys, *gates;                 // [T + 1, B, C]
  A *inputs, *factors;             // [gates, keys][T, B, C], of the means G pooled and of the keys
  A* repeated_state;               // [S, rows of inputs, C]

  Recall(const LayerMemory<A>& memory, Buffers<A>& buffers) {
    const int64_t with_own = (memory.layers + 1) * memory.planes;
    const int64_t asked = memory.rows_asked() * memory.channels;
    state = buffers.take(memory.slots() * memory.planes);
    keys = buffers.take(with_own);
    gates = buffers.take(with_own);
    inputs = buffers.take(asked);
    factors = buffers.take(asked);
    repeated_state = buffers.take(memory.slots() * asked);
  }
};

template <class A>
struct LayerMemory {
  const BaseAttentionInputs& args;
  int64_t batch, channels, planes, layers, heads;
  CellWeights<A> cell;

  explicit LayerMemory(const BaseAttentionInputs& args)
      : args(args),
        batch(args.batch),
        channels(args.channels),
        planes(batch * channels),
        layers(static_cast<int64_t>(args.values.size())),
        heads(channels / args.head_dim),
        cell{args.cell, args.activation, channels, args.hidden, {}} {
    for (std::size_t i = 0; i < args.cell_params.size(); ++i)
      cell.params[i] = as<A>(args.cell_params[i]);
  }

  bool dynamic() const { return !args.cell_params.empty(); }
  bool gates_keys() const { return dynamic() && !args.gated_features; }
  int64_t slots() const { return dynamic() ? cell_slots(cell.kind) : 0; }
  // Rows that the cell makes factors of.
  int64_t rows_asked() const { return dynamic() ? (gates_keys() ? 2 : 1) * layers * batch : 0; }
  int64_t elements() const {
    return (slots() + 2 * (layers + 1)) * planes + (2 + slots()) * rows_asked() * channels;
  }
  // Of layer t in Recall::inputs and factors.
  int64_t gate_row(int64_t t) const { return t * planes; }
  int64_t key_row(int64_t t) const { return (layers + t) * planes; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(args.head_dim)); }
  ChannelFilter<A> filter(const void* weight) const {
    return {as<A>(weight), args.kernel_size, channels};
  }
  const void* key_weight(int64_t t) const { return args.key_weights[static_cast<std::size_t>(t)]; }
  const A* pooled(int64_t t) const { return as<A>(args.pooled[static_cast<std::size_t>(t)]); }

  // ---- forward ---------------------------------------------------------------------------------

  // The new state, and keys and gates of all layers under it. y: mean of x.
  void recall(const A* y, const Recall<A>& to) const {
    if (dynamic()) {
      cell_forward<A>(cell, {y, as<A>(args.state), batch}, to.state, false, args.threads);
      find_factors(to);
    }
    parallel_for(args.threads, (layers + 1) * batch,
                 [&](int64_t row) { recall_row(row / batch, row % batch, y, to); });
  }

  void find_factors(const Recall<A>& to) const {
    if (layers == 0) return;
    parallel_for(args.threads, layers * batch, [&](int64_t row) {
      const int64_t t = row / batch, b = row % batch;
      const A *gates = as<A>(args.gates) + row * channels, *means = pooled(t) + b * channels;
      A* gated_means = to.inputs + row * channels;
      for (int64_t c = 0; c < channels; ++c) gated_means[c] = gates[c] * means[c];
    });
    if (gates_keys()) std::copy_n(as<A>(args.keys), layers * planes, to.inputs + key_row(0));
    for_state_rows([&](int64_t own, int64_t repeated) {
      std::copy_n(to.state + own, channels, to.repeated_state + repeated);
    });
    cell_forward<A>(cell, {to.inputs, to.repeated_state, rows_asked()}, to.factors, true,
                    args.threads);
    if (!args.sigmoid_gate) return;
    parallel_for(args.threads, rows_asked(), [&](int64_t row) {
      A* factors = to.factors + row * channels;
      for (int64_t c = 0; c < channels; c += kLanes<A>) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes<A>, channels - c));
        store_n(factors + c, sigmoid<A>(load_n(factors + c, n)), n);
      }
    });
  }

  // Calls body(offset in the state, offset in the repeated state) for all rows of the latter.
  template <class Body>
  void for_state_rows(const Body& body) const {
    for (int64_t slot = 0; slot < slots(); ++slot)
      for (int64_t row = 0; row < rows_asked(); ++row) {
        const int64_t b = args.first_sample ? 0 : row % batch;
        body((slot * batch + b) * channels, (slot * rows_asked() + row) * channels);
      }
  }

  // Key and gates of layer t, sample b; t = layers: the layer's own.
  void recall_row(int64_t t, int64_t b, const A* y, const Recall<A>& to) const {
    const int64_t sample = b * channels, row = t * planes + sample;
    A *key = to.keys + row, *gates = to.gates + row;
    if (t == layers) {
      thread_local Scratch scratch;
      const ChannelFilter<A> k = filter(args.k_weight);
      k.apply(k.line(y + sample, scratch.template reserve<A>(k.line_elements())), key);
      std::fill_n(gates, channels, A(1));
      return;
    }
    if (dynamic())
      multiply(as<A>(args.gates) + row, to.factors + gate_row(t) + sample, gates);
    else
      std::fill_n(gates, channels, A(1));
    if (args.gated_features)
      features_key(t, b, to);
    else if (dynamic())
      multiply(as<A>(args.keys) + row, to.factors + key_row(t) + sample, key);
    else
      std::copy_n(as<A>(args.keys) + row, channels, key);
  }

  void multiply(const A* one, const A* other, A* out) const {
    for (int64_t c = 0; c < channels; ++c) out[c] = one[c] * other[c];
  }

  // The mean of the gated features of layer t, sample b: a line of the filter in `memory`.
  const A* features_mean(int64_t t, int64_t b, const Recall<A>& of, A* memory) const {
    A* line = filter(key_weight(t)).line(memory);
    multiply(of.gates + t * planes + b * channels, pooled(t) + b * channels, line);
    return line;
  }

  void features_key(int64_t t, int64_t b, const Recall<A>& to) const {
    thread_local Scratch scratch;
    const ChannelFilter<A> k = filter(key_weight(t));
    const A* mean = features_mean(t, b, to, scratch.template reserve<A>(k.line_elements()));
    k.apply(mean, to.keys + t * planes + b * channels);
  }

  // Softmax over the layers of q . K_t / sqrt(head_dim), to scores [T + 1, B, heads].
  void score(const A* y, const Recall<A>& of, A* scores) const {
    parallel_for(args.threads, batch, [&](int64_t b) {
      thread_local Scratch lines, logits;
      const ChannelFilter<A> q = filter(args.q_weight);
      A* memory = lines.template reserve<A>(2 * q.line_elements());
      A* query = memory + q.line_elements();
      double* logit = logits.template reserve<double>(layers + 1);
      q.apply(q.line(y + b * channels, memory), query);
      for (int64_t head = 0; head < heads; ++head) {
        OnlineSum sum;
        for (int64_t t = 0; t <= layers; ++t) {
          logit[t] = scale() * head_dot(head, query, of.keys + t * planes + b * channels);
          sum.add(logit[t]);
        }
        for (int64_t t = 0; t <= layers; ++t)
          scores[(t * batch + b) * heads + head] =
              static_cast<A>(std::exp(logit[t] - sum.most) / sum.total);
      }
    });
  }

  // The sum of exp(logit - most) as logits arrive, `most` being the largest so far.
  struct OnlineSum {
    double most = std::numeric_limits<double>::lowest(), total = 0;

    void add(double logit) {
      if (logit > most) {
        total = total * std::exp(most - logit) + 1;
        most = logit;
      } else {
        total += std::exp(logit - most);
      }
    }
  };

  double head_dot(int64_t head, const A* one, const A* other) const {
    double dot = 0;
    for (int64_t c = head * args.head_dim; c < (head + 1) * args.head_dim; ++c)
      dot += static_cast<double>(one[c]) * other[c];
    return dot;
  }

  // The factors of the values: scores times gates, [T + 1, B, C].
  void weigh(const A* scores, const A* gates, A* weights) const {
    parallel_for(args.threads, (layers + 1) * batch, [&](int64_t row) {
      for (int64_t head = 0; head < heads; ++head) {
        const A score = scores[row * heads + head];
        const int64_t first = row * channels + head * args.head_dim;
        for (int64_t i = first; i < first + args.head_dim; ++i) weights[i] = score * gates[i];
      }
    });
  }

  // ---- backward --------------------------------------------------------------------------------

  // Gradients of the filters along the channels: sums of one sample, then of all.
  struct FilterSums {
    int64_t filters, taps;
    std::vector<double> sums;  // [B, filters, taps]

    FilterSums(int64_t batch, int64_t filters, int64_t taps)
        : filters(filters), taps(taps), sums(static_cast<std::size_t>(batch * filters * taps)) {}
    double* of(int64_t b, int64_t filter) { return sums.data() + (b * filters + filter) * taps; }
    void write(int64_t batch, int64_t filter, void* to) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        double total = 0;
        for (int64_t b = 0; b < batch; ++b) total += of(b, filter)[tap];
        as<A>(to)[tap] = static_cast<A>(total);
      }
    }
  };
  enum { kQuery, kOwnKey, kEarlierKeys };

  // From the gradients of the factors [T + 1, B, C] and of the results, those of all inputs but the
  // maps; dy += the gradient of the mean of x. `grads` is working memory.
  void backward(const BaseAttentionBackward& to, const Recall<A>& of, const A* dweights,
                const Recall<A>& grads, A* dy) const {
    const int64_t key_filters = static_cast<int64_t>(to.dkey_weights.size());
    FilterSums sums(batch, kEarlierKeys + key_filters, args.kernel_size);
    parallel_for(args.threads, batch, [&](int64_t b) {
      score_gradients(to, of, dweights, b, grads, dy + b * channels, sums);
      for (int64_t t = 0; t < layers; ++t) factor_gradients(to, of, t, b, grads, sums);
    });
    sums.write(batch, kQuery, to.dq_weight);
    sums.write(batch, kOwnKey, to.dk_weight);
    for (int64_t t = 0; t < key_filters; ++t)
      sums.write(batch, kEarlierKeys + t, to.dkey_weights[static_cast<std::size_t>(t)]);
    if (dynamic()) cell_gradients(to, of, grads, dy);
  }

  // Gradients of keys and gates of all layers, for sample b; dy += what query and own key
  // pass on.
  void score_gradients(const BaseAttentionBackward& to, const Recall<A>& of, const A* dweights,
                       int64_t b, const Recall<A>& grads, A* dy, FilterSums& sums) const {
    thread_local Scratch lines, logits;
    const ChannelFilter<A> q = filter(args.q_weight), k = filter(args.k_weight);
    const int64_t size = q.line_elements();
    A* memory = lines.template reserve<A>(4 * size);
    const A* y = q.line(as<A>(to.pooled_x) + b * channels, memory);
    A *query = memory + size, *dquery = q.line(query + size);
    double* dlogits = logits.template reserve<double>(layers + 1);
    q.apply(y, query);
    for (int64_t head = 0; head < heads; ++head) {
      softmax_gradients(as<A>(to.scores), of.gates, dweights, b, head, dlogits);
      for (int64_t t = 0; t <= layers; ++t) {
        const int64_t row = t * planes + b * channels;
        const A score = as<A>(to.scores)[(t * batch + b) * heads + head];
        const A dlogit = static_cast<A>(scale() * dlogits[t]);
        for (int64_t c = head * args.head_dim; c < (head + 1) * args.head_dim; ++c) {
          dquery[c] += dlogit * of.keys[row + c];
          grads.keys[row + c] = dlogit * query[c] + value_or_zero(to.grad_keys, row + c);
          grads.gates[row + c] = dweights[row + c] * score + value_or_zero(to.grad_gates, row + c);
        }
      }
    }
    const A* dkey = k.line(grads.keys + layers * planes + b * channels, memory + 3 * size);
    q.backward(y, dquery, dy, sums.of(b, kQuery));
    k.backward(y, dkey, dy, sums.of(b, kOwnKey));
  }

  static A value_or_zero(const void* p, int64_t i) { return p == nullptr ? A(0) : as<A>(p)[i]; }

  void softmax_gradients(const A* scores, const A* gates, const A* dweights, int64_t b,
                         int64_t head, double* dlogits) const {
    double mean = 0;
    for (int64_t t = 0; t <= layers; ++t) {
      const int64_t row = t * planes + b * channels;
      dlogits[t] = head_dot(head, dweights + row, gates + row);
      mean += dlogits[t] * scores[(t * batch + b) * heads + head];
    }
    for (int64_t t = 0; t <= layers; ++t)
      dlogits[t] = (dlogits[t] - mean) * scores[(t * batch + b) * heads + head];
  }

  // Through K' = K d and G' = G d (or K' made of G'), for layer t and sample b: what reaches the
  // inputs directly, and the gradients of the factors.
  void factor_gradients(const BaseAttentionBackward& to, const Recall<A>& of, int64_t t, int64_t b,
                        const Recall<A>& grads, FilterSums& sums) const {
    const int64_t row = t * planes + b * channels;
    if (!dynamic()) {
      std::copy_n(grads.keys + row, channels, as<A>(to.dkeys) + row);
      return;
    }
    A* dpooled = as<A>(to.dpooled[static_cast<std::size_t>(t)]) + b * channels;
    std::fill_n(dpooled, channels, A(0));
    const int64_t sample = b * channels, gate = gate_row(t) + sample, key = key_row(t) + sample;
    if (args.gated_features)
      features_gradients(of, t, b, grads, dpooled, sums.of(b, kEarlierKeys + t));
    else
      product_gradients(as<A>(args.keys) + row, of.factors + key, grads.keys + row,
                        as<A>(to.dkeys) + row, grads.factors + key);
    product_gradients(as<A>(args.gates) + row, of.factors + gate, grads.gates + row,
                      as<A>(to.dgates) + row, grads.factors + gate);
  }

  // Of new = old d, d = gate(u): gradients of old and of u.
  void product_gradients(const A* old, const A* factor, const A* grad, A* dold, A* du) const {
    for (int64_t c = 0; c < channels; ++c) {
      dold[c] = grad[c] * factor[c];
      du[c] = grad[c] * old[c];
      if (args.sigmoid_gate) du[c] *= factor[c] * (A(1) - factor[c]);
    }
  }

  // Of K' = filter(G' pooled).
  void features_gradients(const Recall<A>& of, int64_t t, int64_t b, const Recall<A>& grads,
                          A* dpooled, double* dfilter) const {
    thread_local Scratch lines;
    const ChannelFilter<A> k = filter(key_weight(t));
    const int64_t size = k.line_elements(), row = t * planes + b * channels;
    A* memory = lines.template reserve<A>(3 * size);
    A* dmean = memory + 2 * size;
    std::fill_n(dmean, channels, A(0));
    k.backward(features_mean(t, b, of, memory), k.line(grads.keys + row, memory + size), dmean,
               dfilter);
    for (int64_t c = 0; c < channels; ++c) {
      grads.gates[row + c] += dmean[c] * pooled(t)[b * channels + c];
      dpooled[c] += dmean[c] * of.gates[row + c];
    }
  }

  // Backward of all cell evaluations: those of the gates, then the step's own, which receives what
  // the gates leave at the new state.
  void cell_gradients(const BaseAttentionBackward& to, const Recall<A>& of, const Recall<A>& grads,
                      A* dy) const {
    A* dparams[kMaxCellParams] = {};
    for (std::size_t i = 0; i < to.dcell_params.size(); ++i) dparams[i] = as<A>(to.dcell_params[i]);
    if (to.grad_state != nullptr)
      std::copy_n(as<A>(to.grad_state), slots() * planes, grads.state);
    else
      std::fill_n(grads.state, slots() * planes, A(0));
    if (layers > 0) factor_cell_gradients(to, of, grads, dparams);
    std::fill_n(as<A>(to.dstate), slots() * planes, A(0));
    cell_backward<A>(cell, {as<A>(to.pooled_x), as<A>(args.state), batch}, grads.state, false, dy,
                     as<A>(to.dstate), dparams, layers == 0, args.threads);
  }

  void factor_cell_gradients(const BaseAttentionBackward& to, const Recall<A>& of,
                             const Recall<A>& grads, A* const* dparams) const {
    std::fill_n(grads.inputs, rows_asked() * channels, A(0));
    std::fill_n(grads.repeated_state, slots() * rows_asked() * channels, A(0));
    cell_backward<A>(cell, {of.inputs, of.repeated_state, rows_asked()}, grads.factors, true,
                     grads.inputs, grads.repeated_state, dparams, true, args.threads);
    for_state_rows([&](int64_t own, int64_t repeated) {
      for (int64_t c = 0; c < channels; ++c)
        grads.state[own + c] += grads.repeated_state[repeated + c];
    });
    parallel_for(args.threads, layers * batch, [&](int64_t row) {
      const int64_t t = row / batch, first = row * channels, last = first + channels;
      A* dpooled = as<A>(to.dpooled[static_cast<std::size_t>(t)]) - gate_row(t);
      const A* means = pooled(t) - gate_row(t);
      for (int64_t i = first; i < last; ++i) {
        as<A>(to.dgates)[i] += grads.inputs[i] * means[i];
        dpooled[i] += grads.inputs[i] * as<A>(args.gates)[i];
        if (gates_keys()) as<A>(to.dkeys)[i] += grads.inputs[key_row(0) + i];
      }
    });
  }
};

}  // namespace dla::DLA_ISA
