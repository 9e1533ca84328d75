// What a pass over the feature maps leaves behind: a few numbers per plane.
#pragma once

#include "common/map.h"

namespace dla::DLA_ISA {

// Sums over a plane. u, p, e are shifted by about their mean, or by their value at one pixel as long as
// the means are not known (kShift*). That keeps the squares small: raw float sums of squares lose the
// variance when the mean is large.
enum PlaneSum : int {
  kX, kU, kUU, kP, kPP, kUP, kE, kEE, kPE, kUE,  // of the features
  kG, kGU, kGP, kGE,                             // with the gradient of out
  kD, kDU, kDP, kDE,                             // with the gradient arriving at o
  kSums,
  kShiftU = kSums, kShiftP, kShiftE,
  kPlaneFields
};

// The numbers of all planes, [B, groups, fields, lanes]: those of kLanes neighbouring channels lie
// together, so that what follows works on vectors of channels. (With an array per field, the writes
// of a plane would fall on one cache set and stall the stores of the next behind them.)
template <class A>
struct PlaneTable {
  static constexpr int64_t kPlanes = kLanes<A>;
  A* data;
  int64_t groups;

  PlaneTable(A* data, const MapShape& s) : data(data), groups(ceil_div(s.channels, kPlanes)) {}
  static int64_t elements(const MapShape& s) {
    return s.batch * round_up(s.channels, kPlanes) * kPlaneFields;
  }
  // Field 0 of channel c; the next field is kPlanes elements on.
  A* record(int64_t b, int64_t c) const {
    return data + (b * groups + c / kPlanes) * kPlaneFields * kPlanes + c % kPlanes;
  }
};

}  // namespace dla::DLA_ISA
