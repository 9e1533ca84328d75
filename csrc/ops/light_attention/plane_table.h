// What a pass over the feature maps leaves behind: a few numbers per plane.
#pragma once

#include "common/map.h"
#include "ops/light_attention/plane_sums.h"

namespace dla::DLA_ISA {

// The numbers of all planes, [B, groups, fields, lanes]: those of kLanes neighbouring channels lie
// together, so that what follows works on vectors of channels. (With an array per field, the writes
// of a plane would fall on one cache set and stall the stores of the next behind them.)
template <class A>
struct PlaneTable {
  static constexpr int64_t kPlanes = kLanes<A>;
  A* data;
  int64_t groups, fields;

  PlaneTable(A* data, const MapShape& s, int64_t fields)
      : data(data), groups(ceil_div(s.channels, kPlanes)), fields(fields) {}
  static int64_t elements(const MapShape& s, int64_t fields) {
    return s.batch * round_up(s.channels, kPlanes) * fields;
  }
  // Field 0 of channel c; the next field is kPlanes elements on.
  A* record(int64_t b, int64_t c) const {
    return data + (b * groups + c / kPlanes) * fields * kPlanes + c % kPlanes;
  }
};

}  // namespace dla::DLA_ISA
