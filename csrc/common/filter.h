// 3x3 depthwise filters of a group of planes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/map.h"

namespace dla::DLA_ISA {

// Where a group is one plane there is one number per tap, which becomes a vector when it is used: small
// planes would take as long to fill the vectors as to be filtered. Else there is one vector per tap.
template <class A, bool kPixelLanes>
struct Filter {
  using Tap = std::conditional_t<kPixelLanes, A, Vec<A>>;
  Tap taps[9];

  // Of a group, from numbers per channel.
  static Tap number(const A* per_channel, const Grid<A>& grid, int64_t group) {
    if constexpr (kPixelLanes)
      return per_channel[group];
    else
      return channel_vector(per_channel, grid, group);
  }

  // From filters [C, 3, 3].
  Filter(const A* weight, const Grid<A>& grid, int64_t group) {
    const A* from = weight + group * grid.planes * 9;
    if constexpr (kPixelLanes) {
      std::copy_n(from, 9, taps);
    } else {
      constexpr int64_t v = kLanes<A>;
      constexpr int64_t offsets[9] = {0, v, 2 * v, 3 * v, 4 * v, 5 * v, 6 * v, 7 * v, 8 * v};
      Copy<A, A>::load_planes(from, 9, grid.lanes(group), 9, reinterpret_cast<A*>(taps), offsets);
    }
  }
  Filter() : taps{} {}

  Vec<A> operator[](int tap) const {
    if constexpr (kPixelLanes)
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
