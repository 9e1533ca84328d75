// Attention scores of one sample from its pooled values y [C], and their gradients.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/scratch.h"
#include "common/simd.h"

namespace dla::DLA_ISA {

// A line of channels with zeros before and after it, so that filters along it need no care.
template <class A>
class PaddedLine {
 public:
  static constexpr int64_t lanes = kLanes<A>;

  static int64_t elements(int64_t channels, int64_t taps) {
    return (channels + taps + lanes) / lanes * lanes + lanes;
  }
  PaddedLine(A* memory, int64_t channels, int64_t taps)
      : memory_(memory), channels_(channels), pad_(taps / 2) {
    std::fill_n(memory, elements(channels, taps), A(0));
  }

  A* begin() const { return memory_ + pad_; }

  // body(c, count) for all vectors of channels [c, c + count).
  template <class Body>
  void for_vectors(const Body& body) const {
    for (int64_t c = 0; c < channels_; c += lanes)
      body(c, static_cast<int>(std::min(lanes, channels_ - c)));
  }

 private:
  A* memory_;
  int64_t channels_, pad_;
};

template <class A>
struct ScoreWeights {
  const A *q, *k;
  int64_t kernel_size, channels, head_dim;

  using Line = PaddedLine<A>;

  A scale() const { return A(1) / std::sqrt(static_cast<A>(head_dim)); }
  int64_t line_elements() const { return Line::elements(channels, kernel_size); }
  Line line(A* memory) const { return {memory, channels, kernel_size}; }

  Line copy(const A* y, A* memory) const {
    const Line to = line(memory);
    std::copy_n(y, channels, to.begin());
    return to;
  }

  // Value c of the filter `weight` along the line; `step` -1 is its transpose.
  Vec<A> filtered(const A* weight, const Line& line, int64_t c, int64_t step = 1) const {
    Vec<A> out{};
    const A* at = line.begin() + c - step * (kernel_size / 2);
    for (int64_t t = 0; t < kernel_size; ++t, at += step) out += weight[t] * load(at);
    return out;
  }

  Line filter(const A* weight, const Line& from, A* memory) const {
    const Line to = line(memory);
    to.for_vectors([&](int64_t c, int n) { store_n(to.begin() + c, filtered(weight, from, c), n); });
    return to;
  }

  // Calls body(c, count) for the vectors of a head.
  template <class Body>
  void for_head(int64_t head, const Body& body) const {
    for (int64_t c = head; c < head + head_dim; c += kLanes<A>)
      body(c, static_cast<int>(std::min<int64_t>(kLanes<A>, head + head_dim - c)));
  }

  // a[c] = sigmoid(q . k / sqrt(head_dim)) of c's head.
  void forward(const A* y, A* a, Scratch& scratch) const {
    A* memory = scratch.reserve<A>(3 * line_elements());
    const Line line = copy(y, memory);
    const Line query = filter(q, line, memory + line_elements());
    const Line key = filter(k, line, memory + 2 * line_elements());
    for (int64_t head = 0; head < channels; head += head_dim) {
      Vec<A> products{};
      for_head(head, [&](int64_t c, int n) {
        products += load_n(query.begin() + c, n) * load_n(key.begin() + c, n);
      });
      const A score = A(1) / (A(1) + std::exp(-sum<A>(products) * scale()));
      std::fill_n(a + head, head_dim, score);
    }
  }

  // From da: dy, and the filters' gradients [taps].
  void backward(const A* y, const A* a, const A* da, A* dy, A* dq, A* dk, Scratch& scratch) const {
    const int64_t size = line_elements();
    A* memory = scratch.reserve<A>(5 * size);
    const Line line = copy(y, memory);
    const Line query = filter(q, line, memory + size), key = filter(k, line, memory + 2 * size);
    const Line grad_query = this->line(memory + 3 * size), grad_key = this->line(memory + 4 * size);
    for (int64_t head = 0; head < channels; head += head_dim) {
      Vec<A> grads{};
      for_head(head, [&](int64_t c, int n) { grads += load_n(da + c, n); });
      const A dscore = sum<A>(grads) * a[head] * (A(1) - a[head]) * scale();
      for_head(head, [&](int64_t c, int n) {
        store_n(grad_query.begin() + c, dscore * load_n(key.begin() + c, n), n);
        store_n(grad_key.begin() + c, dscore * load_n(query.begin() + c, n), n);
      });
    }
    line.for_vectors([&](int64_t c, int n) {
      store_n(dy + c, filtered(q, grad_query, c, -1) + filtered(k, grad_key, c, -1), n);
    });
    filter_gradient(line, grad_query, dq);
    filter_gradient(line, grad_key, dk);
  }

  void filter_gradient(const Line& line, const Line& grad, A* dweight) const {
    for (int64_t t = 0; t < kernel_size; ++t) {
      Vec<A> products{};
      line.for_vectors([&](int64_t c, int n) {
        products += load_n(grad.begin() + c, n) * load(line.begin() + c + t - kernel_size / 2);
      });
      dweight[t] = sum<A>(products);
    }
  }
};

}  // namespace dla::DLA_ISA
