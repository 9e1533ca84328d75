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
                                                         int pixel_stride, const Vec<A>* weight,
                                                         Vec<A> (&acc)[R]) {
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const A* column = at - row_stride + (j - 1) * pixel_stride;
    const Vec<A> above = weight[j], centre = weight[3 + j], below = weight[6 + j];
#pragma GCC unroll 10
    for (int r = 0; r < R + 2; ++r) {
      const Vec<A> v = load(column + r * row_stride);
      if (r < R) acc[r < R ? r : 0] += above * v;
      if (r >= 1 && r <= R) acc[r >= 1 ? r - 1 : 0] += centre * v;
      if (r >= 2) acc[r >= 2 ? r - 2 : 0] += below * v;
    }
  }
}

// acc[3i + j] += sum_r g[r] * at[(r + i - 1, j - 1)].
template <int R, class A>
inline __attribute__((always_inline)) void correlate_block(const A* at, int64_t row_stride,
                                                           int pixel_stride, const Vec<A> (&g)[R],
                                                           Vec<A>* acc) {
#pragma GCC unroll 10
  for (int r = 0; r < R + 2; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const Vec<A> v = load(at + (r - 1) * row_stride + (j - 1) * pixel_stride);
      if (r < R) acc[j] += g[r < R ? r : 0] * v;
      if (r >= 1 && r <= R) acc[3 + j] += g[r >= 1 && r <= R ? r - 1 : 0] * v;
      if (r >= 2) acc[6 + j] += g[r >= 2 ? r - 2 : 0] * v;
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
    } else if (left == 7) {
      block.template operator()<7>(row);
      row += 7;
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
