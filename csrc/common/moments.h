// Statistics of batches from the numbers of their planes. Vectors hold neighbouring channels, in double:
// sums over the batch in float are not accurate enough.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {

using Doubles = Vec<double>;

// Channels [first, first + count), the lanes of a vector.
struct ChannelLanes {
  int64_t first;
  int count;

  template <class A>
  using Narrow = typename VectorOf<A, kLanes<double>>::type;

  // From and to an array [C].
  template <class A>
  Doubles load(const A* values) const {
    Narrow<A> v{};
    if (count == kLanes<double>)
      std::memcpy(&v, values + first, sizeof v);
    else
      std::memcpy(&v, values + first, count * sizeof(A));
    return __builtin_convertvector(v, Doubles);
  }
  template <class A>
  void store(A* values, Doubles numbers) const {
    const Narrow<A> v = __builtin_convertvector(numbers, Narrow<A>);
    if (count == kLanes<double>)
      std::memcpy(values + first, &v, sizeof v);
    else
      std::memcpy(values + first, &v, count * sizeof(A));
  }
};

// Calls body(channels) for vectors of channels.
template <class Body>
void for_channels(int threads, std::int64_t channels, const Body& body) {
  constexpr std::int64_t lanes = kLanes<double>;
  parallel_for(threads, ceil_div(channels, lanes), [&](std::int64_t block) {
    const std::int64_t first = block * lanes;
    body(ChannelLanes{first, static_cast<int>(std::min(lanes, channels - first))});
  });
}

inline Doubles square_root(Doubles v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Mean and variance over batch and space, plane by plane, by Chan's rule.
class RunningMoments {
 public:
  // Of a plane: its mean, and the sum of squares about that.
  void add(Doubles mean, Doubles centred_square, double pixels) {
    const Doubles delta = mean - mean_;
    const double before = count_;
    count_ += pixels;
    mean_ += delta * (pixels / count_);
    square_ += (centred_square < 0.0 ? Doubles{} : centred_square) +
               delta * delta * (pixels * before / count_);
  }
  Doubles mean() const { return mean_; }
  Doubles variance() const { return square_ / count_; }

 private:
  double count_ = 0;
  Doubles mean_ = {}, square_ = {};
};

}  // namespace dla::DLA_ISA
