// How passes over whole feature maps are cut into work for the threads.
#pragma once

#include <type_traits>

#include "common/map.h"
#include "common/parallel.h"

namespace dla::DLA_ISA {

struct ChannelRange {
  int64_t first, last;
};

// Work is cut into units of some planes by some samples, whatever the number of threads: a unit's
// result depends on nothing else, so results are the same for any number of threads.
template <class A>
struct Units {
  int64_t groups_per_unit, samples_per_unit, group_units, batch_units;

  // Of memory that is read in longer pieces more arrives in the same time.
  explicit Units(const Grid<A>& grid) : Units(grid, 64 * 1024) {}
  // With all samples of its channels in every unit, if that leaves enough units to share out.
  static Units of_whole_batches(const Grid<A>& grid) {
    Units units(grid, 4 * 1024);
    if (units.group_units < 16) return Units(grid);
    units.samples_per_unit = grid.shape.batch;
    units.batch_units = 1;
    return units;
  }
  bool have_whole_batches() const { return batch_units == 1; }
  int64_t count() const { return group_units * batch_units; }
  int64_t first_group(int64_t unit) const { return unit % group_units * groups_per_unit; }
  ChannelRange channels(const Grid<A>& grid, int64_t unit) const {
    const int64_t first = first_group(unit) * grid.planes;
    return {first, std::min(grid.shape.channels, first + groups_per_unit * grid.planes)};
  }

 private:
  Units(const Grid<A>& grid, int64_t bytes_of_sample) {
    const int64_t group_bytes =
        grid.shape.pixels() * grid.planes * static_cast<int64_t>(sizeof(A));
    // Of many small planes the sums that are kept for each would fall out of the L1 cache. And with
    // all channels in a unit, every unit of samples would leave such sums of them all to be added up.
    const int64_t most = std::clamp<int64_t>(grid.groups / 4, grid.together, 32);
    const int64_t wanted = std::clamp<int64_t>(bytes_of_sample / group_bytes, grid.together, most);
    // Units of equal work, but for the last groups.
    const int64_t even = ceil_div(grid.groups, ceil_div(grid.groups, wanted));
    groups_per_unit = std::min(round_up(even, grid.together), grid.groups);
    group_units = ceil_div(grid.groups, groups_per_unit);
    // Enough units to share out; few, since each leaves its own partial weight gradients.
    const int64_t batch = grid.shape.batch;
    samples_per_unit = ceil_div(batch, std::min(batch, ceil_div(32, group_units)));
    while (batch % samples_per_unit != 0) --samples_per_unit;
    batch_units = ceil_div(batch, samples_per_unit);
  }
};

constexpr int kMostTogether = 4;  // bound of Grid::together

// The strips of a unit, one after the other: top to bottom in each plane, the groups of `together` side
// by side.
template <class A>
struct StripCursor {
  const Grid<A>& grid;
  int64_t first_group, last_group;
  int64_t b, last_sample;
  int64_t leader, row = 0, slot = 0;  // leader: first of the groups that are side by side

  StripCursor(const Units<A>& units, const Grid<A>& grid, int64_t unit)
      : grid(grid),
        first_group(units.first_group(unit)),
        last_group(std::min(grid.groups, first_group + units.groups_per_unit)),
        b(unit / units.group_units * units.samples_per_unit),
        last_sample(std::min(grid.shape.batch, b + units.samples_per_unit)),
        leader(first_group) {}
  explicit operator bool() const { return b < last_sample; }
  int64_t group() const { return leader + slot; }
  void next() {
    if (++slot < std::min(grid.together, last_group - leader)) return;
    slot = 0;
    if ((row += grid.strip_rows) < grid.shape.height) return;
    row = 0;
    if ((leader += grid.together) < last_group) return;
    leader = first_group;
    ++b;
  }
  // Of a map, where the strip begins.
  int64_t offset() const {
    return grid.shape.plane(b, group() * grid.planes) + row * grid.shape.row_elements();
  }
};

// Calls body(place, slot) over all strips of a unit. `slot` < kMostTogether tells the groups apart whose
// strips are interleaved.
template <bool kPixelLanes, class A, class Body>
inline void for_strips(const Units<A>& units, const Grid<A>& grid, int64_t unit, const Body& body) {
  StripCursor<A> cursor(units, grid, unit);
  int64_t start = cursor.offset();
  while (cursor) {
    const int64_t b = cursor.b, group = cursor.group(), slot = cursor.slot;
    const Strip strip{cursor.row, std::min(grid.shape.height, cursor.row + grid.strip_rows)};
    cursor.next();
    const int64_t next = cursor ? cursor.offset() : start;
    body(Place<A, kPixelLanes>{grid, b, group, strip, start, next - start}, slot);
    start = next;
  }
}

// Calls body(first, last) for runs of a row's vectors, of which sums are formed on their own: long chains
// of additions lose digits.
template <class Body>
inline __attribute__((always_inline)) void for_runs(int64_t vectors, const Body& body) {
  constexpr int64_t most = 64;
  for (int64_t first = 0; first < vectors; first += most)
    body(first, std::min(vectors, first + most));
}

// Calls body(row, vector, mask of the lanes within the map) for a strip.
template <class Place, class Body>
inline void for_strip_vectors(const Place& place, const Body& body) {
  const auto& grid = place.grid;
  const auto channels = grid.channel_mask(place.group);
  for (int64_t row = place.strip.first; row < place.strip.last; ++row)
    for (int64_t k = 0; k < grid.vectors; ++k) body(row, k, grid.own(k, channels));
}

// Calls body with a constant that says whether the lanes are pixels.
template <class A, class Body>
void with_lanes(const Grid<A>& grid, const Body& body) {
  if constexpr (kTuned<A>)
    if (!grid.channel_lanes) return body(std::true_type{});
  body(std::false_type{});
}

// Runs a pass over the grid.
template <template <class, bool> class Pass, class A, class... Fields>
void run_pass(int threads, const Grid<A>& grid, const Fields&... fields) {
  with_lanes(grid, [&](auto fixed) { Pass<A, fixed>{grid, fields...}.run(threads); });
}

}  // namespace dla::DLA_ISA
