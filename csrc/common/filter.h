// 3x3 depthwise filters of a group of planes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/map.h"

namespace dla::DLA_ISA {

// Where a group is one plane there is one number per tap, which becomes a vector when it is used: small
// planes would take as long to fill the vectors as to be filtered. Else there is one vector per tap.
template <class A, bool kOnePlane>
struct Filter {
  using Tap = std::conditional_t<kOnePlane, A, Vec<A>>;
  Tap taps[9];

  // Of a group, from numbers per channel.
  static Tap number(const A* per_channel, const Grid<A>& grid, int64_t group) {
    if constexpr (kOnePlane)
      return per_channel[group];
    else
      return channel_vector(per_channel, grid, group);
  }

  // From filters [C, 3, 3].
  Filter(const A* weight, const Grid<A>& grid, int64_t group) {
    const A* from = weight + group * grid.planes * 9;
    if constexpr (kOnePlane) {
      std::copy_n(from, 9, taps);
    } else if (grid.channel_lanes) {
      Copy<A, A>::load_planes(from, 9, grid.lanes(group), 9, reinterpret_cast<A*>(taps));
    } else {
      for (int i = 0; i < 9; ++i) taps[i] = splat(from[i]);
    }
  }
  Filter() : taps{} {}

  Vec<A> operator[](int tap) const {
    if constexpr (kOnePlane)
      return splat(taps[tap]);
    else
      return taps[tap];
  }
  void operator*=(Tap factor) {
    for (Tap& tap : taps) tap *= factor;
  }
  Filter flipped() const {
    Filter flipped;
    std::reverse_copy(taps, taps + 9, flipped.taps);
    return flipped;
  }
  Vec<A> sum() const {
    Tap sum{};
    for (const Tap& tap : taps) sum += tap;
    return sum - Vec<A>{};
  }
};

}  // namespace dla::DLA_ISA
