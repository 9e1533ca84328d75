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
// the vector at the tap, zero outside the map. Rows with a row of the block on either side are read
// whole, beyond their ends (Grid::safe_rows), and masked in the sum, which costs nothing.
template <int R, class A, bool kFixedStrides, class Add>
inline __attribute__((always_inline)) void for_taps(const Window<const A, kFixedStrides>& in,
                                                    const A* at, const TapMasks<A>& masks,
                                                    const Add& add) {
  const A* left = at - in.row_stride - in.pixel_stride();
#pragma GCC unroll 10
  for (int r = -1; r <= R; ++r, left += in.row_stride) {
    const bool whole = kHasMaskedArithmetic && 0 < r && r < R - 1;
    const Mask<A>(&mask)[3] = masks.at[r < 0 ? 0 : r < R ? 1 : 2];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const A* tap = left + j * in.pixel_stride();
      const Vec<A> v = in_register(whole ? load(tap) : load_masked<A>(tap, mask[j]));
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
        if (0 <= r - i + 1 && r - i + 1 < R)
          add(r - i + 1, i, j, [&](Vec<A> a, Vec<A> c) __attribute__((always_inline)) {
            return whole ? multiply_add_masked<A>(a, v, c, mask[j]) : c + a * v;
          });
    }
  }
}

// acc[r] += sum_ij filter[3i + j] * (vector at tap (i, j) of row r).
template <int R, class A, bool kFixedStrides>
inline __attribute__((always_inline)) void stencil_block(const Window<const A, kFixedStrides>& in,
                                                         const A* at, const TapMasks<A>& masks,
                                                         const Filter<A, kFixedStrides>& filter,
                                                         Vec<A> (&acc)[R]) {
  Vec<A> w[9];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) w[tap] = in_register(filter[tap]);
  for_taps<R, A>(in, at, masks,
                 [&](int r, int i, int j, const auto& add) __attribute__((always_inline)) {
                   acc[r] = add(w[3 * i + j], acc[r]);
                 });
}

// acc[3i + j] += sum_r g[r] * (vector at tap (i, j) of row r).
template <int R, class A, bool kFixedStrides>
inline __attribute__((always_inline)) void correlate_block(const Window<const A, kFixedStrides>& in,
                                                           const A* at, const TapMasks<A>& masks,
                                                           const Vec<A> (&g)[R], Vec<A>* acc) {
  for_taps<R, A>(in, at, masks,
                 [&](int r, int i, int j, const auto& add) __attribute__((always_inline)) {
                   acc[3 * i + j] = add(g[r], acc[3 * i + j]);
                 });
}

// A block of zeros (or of another value); an initialiser would be one slow instruction.
template <int R, class V>
inline __attribute__((always_inline)) void fill_block(V (&block)[R], V value) {
#pragma GCC unroll 18
  for (int r = 0; r < R; ++r) block[r] = value;
}

// Fetches what follows the R rows at `at`.
template <int R, class A, bool kFixedStrides>
inline __attribute__((always_inline)) void prefetch_block(const Window<const A, kFixedStrides>& in,
                                                          const A* at) {
  const char* next = reinterpret_cast<const char*>(at) + in.ahead;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    __builtin_prefetch(next + r * in.row_stride * static_cast<std::ptrdiff_t>(sizeof(A)));
}

// Calls block.template operator()<R>(row) so that blocks of R rows cover [first, last).
template <class A, class Block>
inline void for_blocks(const Grid<A>& grid, int64_t first, int64_t last, const Block& block) {
  int64_t row = first;
  if (grid.safe_rows) {
    if constexpr (kMostRows<A> >= 8)
      for (; row + 8 <= last; row += 8) block.template operator()<8>(row);
    if constexpr (kMostRows<A> >= 4)
      for (; row + 4 <= last; row += 4) block.template operator()<4>(row);
  }
  for (; row < last; ++row) block.template operator()<1>(row);
}

}  // namespace dla::DLA_ISA
