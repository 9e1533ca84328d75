// Register blocks of the 3x3 depthwise stencil and of its weight gradient.
//
// A block is R rows of one vector: every loaded vector feeds up to three multiply-adds (the rows
// above, at and below it), so that the loads stay well under the arithmetic.
#pragma once

#include "filter.h"
#include "map.h"

namespace dla::DLA_ISA {

// Keeps the compiler from reading v from memory again at every use, as it likes to.
template <class V>
inline __attribute__((always_inline)) V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Calls add(r, i, j, a function (a, c) -> c + a v) for the taps (i, j) of all rows r of a block; v is
// the vector at the tap, zero outside the map. Pixel lanes: rows with a row of the block on either side
// are read whole, beyond their ends (Grid::safe_rows), and masked in the sum, which costs nothing.
template <int R, bool kPixelLanes, class A, class Add>
inline __attribute__((always_inline)) void for_taps(RowCursor<const A> rows, const Taps<A>& taps,
                                                    const Add& add) {
  constexpr int64_t pixel_stride = kPixelLanes ? 1 : kLanes<A>;
#pragma GCC unroll 10
  for (int r = -1; r <= R; ++r) {
    const A* row = rows.next();
    const bool beyond = kPixelLanes && ((r < 0 && taps.first) || (r == R && taps.last));
    const A* centre = beyond ? taps.zeros : row;
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const A* tap = centre + (j - 1) * pixel_stride;
      const bool whole = !kPixelLanes || (kHasMaskedArithmetic && 0 < r && r < R - 1);
      const Vec<A> v = in_register(whole ? load(tap) : load_masked<A>(tap, taps.masks[j]));
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
        if (0 <= r - i + 1 && r - i + 1 < R)
          add(r - i + 1, i, j, [&](Vec<A> a, Vec<A> c) __attribute__((always_inline)) {
            return kPixelLanes && whole ? multiply_add_masked<A>(a, v, c, taps.masks[j]) : c + a * v;
          });
    }
  }
}

// A filter in registers, or that of its gradient: flipped both ways.
template <class A>
struct FilterVectors {
  Vec<A> at[9];

  template <bool kPixelLanes>
  inline __attribute__((always_inline)) explicit FilterVectors(
      const Filter<A, kPixelLanes>& filter, bool flipped = false) {
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) at[tap] = in_register(filter[flipped ? 8 - tap : tap]);
  }
};

// acc[r] += sum_ij filter[3i + j] * (vector at tap (i, j) of row r).
template <int R, class A, bool kPixelLanes>
inline __attribute__((always_inline)) void stencil_block(const Window<const A, kPixelLanes>& in,
                                                         int64_t row, int64_t k,
                                                         const Taps<A>& taps,
                                                         const FilterVectors<A>& filter,
                                                         Vec<A> (&acc)[R]) {
  for_taps<R, kPixelLanes>(in.rows(row - 1, k), taps,
                           [&](int r, int i, int j, const auto& add) __attribute__((always_inline)) {
                             acc[r] = add(filter.at[3 * i + j], acc[r]);
                           });
}

// acc[3i + j] += sum_r g[r] * (vector at tap (i, j) of row r).
template <int R, class A, bool kPixelLanes>
inline __attribute__((always_inline)) void correlate_block(const Window<const A, kPixelLanes>& in,
                                                           int64_t row, int64_t k,
                                                           const Taps<A>& taps,
                                                           const Vec<A> (&g)[R], Vec<A> (&acc)[9]) {
  for_taps<R, kPixelLanes>(in.rows(row - 1, k), taps,
                           [&](int r, int i, int j, const auto& add) __attribute__((always_inline)) {
                             acc[3 * i + j] = add(g[r], acc[3 * i + j]);
                           });
}

// acc[r] += factor * row r.
template <int R, class A>
inline __attribute__((always_inline)) void add_rows(RowCursor<const A> rows, Mask<A> own,
                                                    Vec<A> factor, Vec<A> (&acc)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] += factor * load_masked<A>(rows.next(), own);
}

// Writes R rows.
template <int R, class A, bool kPixelLanes>
inline __attribute__((always_inline)) void store_block(const Window<A, kPixelLanes>& to, int64_t row,
                                                       int64_t k, Mask<A> own,
                                                       const Vec<A> (&values)[R]) {
  auto rows = to.rows(row, k);
  if (to.streamed) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) stream(rows.next(), values[r]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_masked<A>(rows.next(), values[r], own);
  }
}

// What stencil_block() adds; or, unless the filter is `whole`, what its centre alone does.
template <int R, class A, bool kPixelLanes>
inline __attribute__((always_inline)) void filter_block(const Window<const A, kPixelLanes>& in,
                                                        int64_t row, int64_t k,
                                                        const Taps<A>& taps,
                                                        const FilterVectors<A>& filter, bool whole,
                                                        Vec<A> (&acc)[R]) {
  if (whole)
    stencil_block<R, A>(in, row, k, taps, filter, acc);
  else
    add_rows<R, A>(in.rows(row, k), taps.own(), filter.at[4], acc);
}

// A block of zeros (or of another value); an initialiser would be one slow instruction.
template <int R, class V>
inline __attribute__((always_inline)) void fill_block(V (&block)[R], V value) {
#pragma GCC unroll 18
  for (int r = 0; r < R; ++r) block[r] = value;
}

// Fetches R rows of a vector; to the L2 cache if that can be, since more than a few dozen lines on their
// way to an L1 cache stop whatever else would be loaded there.
template <int R, bool kPixelLanes>
inline __attribute__((always_inline)) void prefetch_block(const Upcoming& upcoming, int64_t row,
                                                          int64_t k) {
  auto rows = upcoming.rows(row, k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) __builtin_prefetch(rows.next(), 0, kFetchesStrips<kPixelLanes> ? 2 : 3);
}

// Calls rows.template operator()<R>(first, last) so that blocks of R rows cover [first, last). What is
// called can keep its filters in registers from block to block.
template <class A, class Rows>
inline void for_ranges(const Grid<A>& grid, int64_t first, int64_t last, const Rows& rows) {
  const auto blocks = [&]<int R>() {
    const int64_t end = first + (last - first) / R * R;
    if (first < end) rows.template operator()<R>(first, end);
    first = end;
  };
  if (grid.safe_rows) {
    if constexpr (kMostRows<A> >= 8) blocks.template operator()<8>();
    if constexpr (kMostRows<A> >= 4) blocks.template operator()<4>();
  }
  blocks.template operator()<1>();
}

// Calls block.template operator()<R>(row, the filter in registers) for every block.
template <class A, bool kPixelLanes, class Block>
inline void for_filtered_blocks(const Grid<A>& grid, int64_t first, int64_t last,
                                const Filter<A, kPixelLanes>& filter, const Block& block,
                                bool flipped = false) {
  for_ranges(grid, first, last, [&]<int R>(int64_t from, int64_t to) {
    const FilterVectors<A> vectors(filter, flipped);
    for (int64_t row = from; row < to; row += R) block.template operator()<R>(row, vectors);
  });
}

// Calls block.template operator()<R>(row) for every block.
template <class A, class Block>
inline void for_blocks(const Grid<A>& grid, int64_t first, int64_t last, const Block& block) {
  for_ranges(grid, first, last, [&]<int R>(int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row += R) block.template operator()<R>(row);
  });
}

}  // namespace dla::DLA_ISA
