// Statistics of o from the numbers of its planes. Vectors hold neighbouring channels, in double:
// sums over the batch in float are not accurate enough.
#pragma once

#include <cmath>
#include <cstring>

#include "ops/light_attention/plane_table.h"

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

inline Doubles square_root(Doubles v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// o of the planes of some channels of one sample, o = a u + lam_d p + lam e, from their shifted sums.
template <class A>
struct PlaneStatistics {
  const A* record;
  double pixels;
  Doubles a, lam_d, lam, u, p, e, uu, pp, ee, up, ue, pe, shift_u, shift_p, shift_e;

  PlaneStatistics(const PlaneTable<A>& table, int64_t b, const ChannelLanes& c, double pixels,
                  Doubles a, Doubles d, Doubles lam)
      : record(table.record(b, c.first)), pixels(pixels), a(a), lam_d(lam * d), lam(lam),
        u(at(kU)), p(at(kP)), e(at(kE)), uu(at(kUU)), pp(at(kPP)), ee(at(kEE)),
        up(at(kUP)), ue(at(kUE)), pe(at(kPE)),
        shift_u(at(kShiftU)), shift_p(at(kShiftP)), shift_e(at(kShiftE)) {}

  // The table has whole vectors of channels.
  Doubles at(int field) const {
    return ChannelLanes{field * PlaneTable<A>::kPlanes, kLanes<double>}.load(record);
  }
  Doubles mix(Doubles of_u, Doubles of_p, Doubles of_e) const {
    return a * of_u + lam_d * of_p + lam * of_e;
  }
  Doubles shift() const { return mix(shift_u, shift_p, shift_e); }
  // Sum of o - shift, and of its square about its own mean (but for rounding, at least 0).
  Doubles sum() const { return mix(u, p, e); }
  Doubles centred_square() const {
    const Doubles square = a * mix(uu, up, ue) + lam_d * mix(up, pp, pe) + lam * mix(ue, pe, ee);
    return square - sum() * sum() / pixels;
  }
};

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
  template <class A>
  void add(const PlaneStatistics<A>& plane) {
    add(plane.shift() + plane.sum() / plane.pixels, plane.centred_square(), plane.pixels);
  }
  Doubles mean() const { return mean_; }
  Doubles variance() const { return square_ / count_; }

 private:
  double count_ = 0;
  Doubles mean_ = {}, square_ = {};
};

}  // namespace dla::DLA_ISA
