// 3x3 depthwise filters of a group of planes.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "common/map.h"

namespace dla::DLA_ISA {

// Filters [C, 3, 3] as passes take them. Every sample asks for them again: for channel lanes they are
// transposed once, to [groups, 9, lanes].
template <class A>
class FilterBank {
 public:
  FilterBank(const A* weight, const Grid<A>& grid) : filters_(weight) {
    constexpr int64_t v = kLanes<A>;
    constexpr int64_t offsets[9] = {0, v, 2 * v, 3 * v, 4 * v, 5 * v, 6 * v, 7 * v, 8 * v};
    if (weight == nullptr || !grid.channel_lanes) return;
    transposed_.resize(static_cast<std::size_t>(grid.groups * 9 * v));
    for (int64_t group = 0; group < grid.groups; ++group)
      Copy<A, A>::load_planes(weight + group * grid.planes * 9, 9, grid.lanes(group), 9,
                              transposed_.data() + group * 9 * v, offsets);
    filters_ = transposed_.data();
  }
  FilterBank(const FilterBank&) = delete;

  const A* data() const { return filters_; }  // null if there are none

 private:
  const A* filters_;
  std::vector<A> transposed_;
};

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

  // From those of a FilterBank.
  Filter(const A* filters, int64_t group) {
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap] = read(filters, group, tap);
  }
  // The same times a factor.
  void assign(const A* filters, int64_t group, Tap factor) {
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap] = read(filters, group, tap) * factor;
  }
  Filter() : taps{} {}

  Vec<A> operator[](int tap) const {
    if constexpr (kPixelLanes)
      return splat(taps[tap]);
    else
      return taps[tap];
  }
  Vec<A> sum() const {
    Tap sum{};
    for (const Tap& tap : taps) sum += tap;
    return sum - Vec<A>{};
  }

 private:
  static Tap read(const A* filters, int64_t group, int64_t tap) {
    if constexpr (kPixelLanes)
      return filters[group * 9 + tap];
    else
      return load(filters + (group * 9 + tap) * kLanes<A>);
  }
};

}  // namespace dla::DLA_ISA
