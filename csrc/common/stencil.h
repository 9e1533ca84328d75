// Register blocks of the 3x3 depthwise stencil and of its weight gradient on padded tiles.
//
// A block is R rows of one vector: every loaded vector feeds up to three multiply-adds (the rows
// above, at and below it), so that the loads stay well under the arithmetic.
#pragma once

#include "tile.h"

namespace dla::DLA_ISA {

// acc[r] += sum_ij weight[3i + j] * at[(r + i - 1, j - 1)], i and j in 0..2.
template <int R, class A>
inline __attribute__((always_inline)) void stencil_block(const A* at, int64_t row_stride,
                                                         int64_t pixel_stride,
                                                         const Vec<A>* weight, Vec<A> (&acc)[R]) {
  const A* left = at - row_stride - pixel_stride;
#pragma GCC unroll 10
  for (int r = 0; r < R + 2; ++r, left += row_stride) {
    const Vec<A> row[3] = {load(left), load(left + pixel_stride), load(left + 2 * pixel_stride)};
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
        if (r >= i && r - i < R) acc[r - i] += weight[3 * i + j] * row[j];
    }
  }
}

// acc[3i + j] += sum_r g[r] * at[(r + i - 1, j - 1)].
template <int R, class A>
inline __attribute__((always_inline)) void correlate_block(const A* at, int64_t row_stride,
                                                           int64_t pixel_stride,
                                                           const Vec<A> (&g)[R], Vec<A>* acc) {
  const A* left = at - row_stride - pixel_stride;
#pragma GCC unroll 10
  for (int r = 0; r < R + 2; ++r, left += row_stride) {
    const Vec<A> row[3] = {load(left), load(left + pixel_stride), load(left + 2 * pixel_stride)};
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
        if (r >= i && r - i < R) acc[3 * i + j] += g[r - i] * row[j];
    }
  }
}

// Calls block.template operator()<R>(row) so that the blocks cover rows [first, last).
template <class Block>
inline void for_row_blocks(int64_t first, int64_t last, const Block& block) {
  int64_t row = first;
  while (row < last) {
    const int64_t left = last - row;
    if (left >= 8) {
      block.template operator()<8>(row);
      row += 8;
    } else if (left >= 4) {
      block.template operator()<4>(row);
      row += 4;
    } else if (left >= 2) {
      block.template operator()<2>(row);
      row += 2;
    } else {
      block.template operator()<1>(row);
      row += 1;
    }
  }
}

}  // namespace dla::DLA_ISA
