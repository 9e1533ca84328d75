// One small filter along the channels of pooled values: queries and keys.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {

// What is filtered is a line: the values of a sample, with zeros before and after them that spare
// the loops all care.
template <class A>
struct ChannelFilter {
  const A* weight;  // [taps], odd
  std::int64_t taps, channels;

  // With all that is read around the values; whole vectors.
  std::int64_t line_elements() const { return round_up(channels + taps + kLanes<A>, kLanes<A>); }
  // A line of zeros in `memory`, where its values begin.
  A* line(A* memory) const {
    std::fill_n(memory, line_elements(), A(0));
    return memory + taps / 2;
  }
  A* line(const A* values, A* memory) const {
    return std::copy_n(values, channels, line(memory)) - channels;
  }

  // out[c] = sum_t weight[t] line[c + t - taps / 2].
  void apply(const A* line, A* out) const {
    for_vectors<A>(channels,
                   [&](std::int64_t c, int n) { store_n(out + c, filtered(line, c, 1), n); });
  }

  // From the gradient of what apply() made of a line, as a line too: dy += and dweight[t] =.
  template <class Sum>
  void backward(const A* line, const A* grad, A* dy, Sum* dweight) const {
    for_vectors<A>(channels, [&](std::int64_t c, int n) {
      store_n(dy + c, load_n(dy + c, n) + filtered(grad, c, -1), n);
    });
    for (std::int64_t t = 0; t < taps; ++t) {
      Vec<A> products{};
      for_vectors<A>(channels, [&](std::int64_t c, int n) {
        products += load_n(grad + c, n) * load(line + c + t - taps / 2);
      });
      dweight[t] = sum<A>(products);
    }
  }

 private:
  // Values from c on; `step` -1: of the transposed filter.
  Vec<A> filtered(const A* line, std::int64_t c, std::int64_t step) const {
    Vec<A> out{};
    const A* at = line + c - step * (taps / 2);
    for (std::int64_t t = 0; t < taps; ++t, at += step) out += weight[t] * load(at);
    return out;
  }
};

}  // namespace dla::DLA_ISA
