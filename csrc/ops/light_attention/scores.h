// Attention scores of one sample from its pooled values y [C], and their gradients.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/channel_filter.h"
#include "common/scratch.h"

namespace dla::DLA_ISA {

template <class A>
struct ScoreWeights {
  ChannelFilter<A> q, k;
  int64_t head_dim;

  A scale() const { return A(1) / std::sqrt(static_cast<A>(head_dim)); }

  // Calls body(c, count) for the vectors of a head.
  template <class Body>
  void for_head(int64_t head, const Body& body) const {
    for_vectors<A>(head_dim, [&](int64_t c, int n) { body(head + c, n); });
  }

  // a[c] = sigmoid(q . k / sqrt(head_dim)) of c's head.
  void forward(const A* y, A* a, Scratch& scratch) const {
    const int64_t size = q.line_elements();
    A* memory = scratch.reserve<A>(3 * size);
    const A* line = q.line(y, memory);
    A *query = memory + size, *key = query + size;
    q.apply(line, query);
    k.apply(line, key);
    for (int64_t head = 0; head < q.channels; head += head_dim) {
      Vec<A> products{};
      for_head(head,
               [&](int64_t c, int n) { products += load_n(query + c, n) * load_n(key + c, n); });
      const A score = A(1) / (A(1) + std::exp(-sum<A>(products) * scale()));
      std::fill_n(a + head, head_dim, score);
    }
  }

  // From da: dy, and the filters' gradients [taps].
  void backward(const A* y, const A* a, const A* da, A* dy, A* dq, A* dk, Scratch& scratch) const {
    const int64_t size = q.line_elements();
    A* memory = scratch.reserve<A>(5 * size);
    const A* line = q.line(y, memory);
    A *query = memory + size, *key = query + size;
    A *grad_query = q.line(key + size), *grad_key = k.line(key + 2 * size);
    q.apply(line, query);
    k.apply(line, key);
    for (int64_t head = 0; head < q.channels; head += head_dim) {
      Vec<A> grads{};
      for_head(head, [&](int64_t c, int n) { grads += load_n(da + c, n); });
      const A dscore = sum<A>(grads) * a[head] * (A(1) - a[head]) * scale();
      for_head(head, [&](int64_t c, int n) {
        store_n(grad_query + c, dscore * load_n(key + c, n), n);
        store_n(grad_key + c, dscore * load_n(query + c, n), n);
      });
    }
    std::fill_n(dy, q.channels, A(0));
    q.backward(line, grad_query, dy, dq);
    k.backward(line, grad_key, dy, dk);
  }
};

}  // namespace dla::DLA_ISA
