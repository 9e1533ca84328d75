// One small filter along the channels of pooled values: queries and keys.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dla::DLA_ISA {

template <class A>
struct ChannelFilter {
  const A* weight;  // [taps], odd
  std::int64_t taps, channels;

  // Calls body(t, shift, first, last): tap t joins channels [first, last) to those `shift` apart.
  template <class Body>
  void for_taps(const Body& body) const {
    for (std::int64_t t = 0; t < taps; ++t) {
      const std::int64_t shift = t - taps / 2;
      body(t, shift, std::max<std::int64_t>(0, -shift), std::min(channels, channels - shift));
    }
  }

  // out[c] = sum_t weight[t] y[c + t - taps / 2], zero outside.
  void apply(const A* y, A* out) const {
    std::fill_n(out, channels, A(0));
    for_taps([&](std::int64_t t, std::int64_t shift, std::int64_t first, std::int64_t last) {
      for (std::int64_t c = first; c < last; ++c) out[c] += weight[t] * y[c + shift];
    });
  }

  // Gradients: dy += and dweight[t] +=.
  void backward(const A* y, const A* grad, A* dy, double* dweight) const {
    for_taps([&](std::int64_t t, std::int64_t shift, std::int64_t first, std::int64_t last) {
      double sum = 0;
      for (std::int64_t c = first; c < last; ++c) {
        dy[c + shift] += weight[t] * grad[c];
        sum += static_cast<double>(grad[c]) * y[c + shift];
      }
      dweight[t] += sum;
    });
  }
};

}  // namespace dla::DLA_ISA
