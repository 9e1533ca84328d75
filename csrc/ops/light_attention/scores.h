// The part of light_attention that works on [B, C] numbers only: attention scores, statistics of o
// from the plane sums, and their gradients. Statistics are combined in double.
#pragma once

#include <cmath>

#include "common/channel_filter.h"
#include "ops/light_attention/passes.h"

namespace dla::DLA_ISA {

template <class A>
struct ScoreWeights {
  const A *q, *k;
  int64_t kernel_size, channels, head_dim;

  ChannelFilter<A> filter(const A* weight) const { return {weight, kernel_size, channels}; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }

  // a[c] = sigmoid(q . k / sqrt(head_dim)) of c's head, for one sample; q and k are [C] buffers.
  void forward(const A* y, A* query, A* key, A* a) const {
    filter(q).apply(y, query);
    filter(k).apply(y, key);
    for (int64_t head = 0; head < channels; head += head_dim) {
      double dot = 0;
      for (int64_t c = head; c < head + head_dim; ++c)
        dot += static_cast<double>(query[c]) * key[c];
      const A score = static_cast<A>(1.0 / (1.0 + std::exp(-dot * scale())));
      std::fill_n(a + head, head_dim, score);
    }
  }

  // From da [C] of one sample: dy += and the filters' gradients +=.
  void backward(const A* y, const A* a, const A* da, A* query, A* key, A* grad_query, A* grad_key,
                A* dy, double* dq, double* dk) const {
    filter(q).apply(y, query);
    filter(k).apply(y, key);
    for (int64_t head = 0; head < channels; head += head_dim) {
      double grad = 0;
      for (int64_t c = head; c < head + head_dim; ++c) grad += da[c];
      const double score = a[head];
      const A dscore = static_cast<A>(grad * score * (1 - score) * scale());
      for (int64_t c = head; c < head + head_dim; ++c) {
        grad_query[c] = dscore * key[c];
        grad_key[c] = dscore * query[c];
      }
    }
    filter(q).backward(y, grad_query, dy, dq);
    filter(k).backward(y, grad_key, dy, dk);
  }
};

// o of one plane as a combination: o = a u + lam_d p + lam e, with the plane's shifted sums.
struct PlaneStatistics {
  double n, a, lam_d, lam;
  double u, p, e, uu, pp, ee, up, ue, pe, shift_u, shift_p, shift_e;

  template <class A>
  PlaneStatistics(const PlaneTable<A>& t, int64_t b, int64_t c, double pixels, A a, A d, A lam)
      : n(pixels), a(a), lam_d(static_cast<double>(lam) * d), lam(lam),
        u(t.at(kU, b, c)), p(t.at(kP, b, c)), e(t.at(kE, b, c)),
        uu(t.at(kUU, b, c)), pp(t.at(kPP, b, c)), ee(t.at(kEE, b, c)),
        up(t.at(kUP, b, c)), ue(t.at(kUE, b, c)), pe(t.at(kPE, b, c)),
        shift_u(t.at(kShiftU, b, c)), shift_p(t.at(kShiftP, b, c)), shift_e(t.at(kShiftE, b, c)) {}

  double mix(double of_u, double of_p, double of_e) const {
    return a * of_u + lam_d * of_p + lam * of_e;
  }
  double shift() const { return mix(shift_u, shift_p, shift_e); }
  // Sum of o - shift, and of its square about its own mean.
  double sum() const { return mix(u, p, e); }
  double centred_square() const {
    const double square = a * mix(uu, up, ue) + lam_d * mix(up, pp, pe) + lam * mix(ue, pe, ee);
    return std::max(0.0, square - sum() * sum() / n);
  }
};

}  // namespace dla::DLA_ISA
