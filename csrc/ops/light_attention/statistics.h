// Statistics of o from the numbers of its planes.
#pragma once

#include "common/moments.h"
#include "ops/light_attention/plane_table.h"

namespace dla::DLA_ISA {

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
  void join(RunningMoments& moments) const {
    moments.add(shift() + sum() / pixels, centred_square(), pixels);
  }
};

}  // namespace dla::DLA_ISA
