// Small matrix products, one thread. The matrices of this package are a few hundred wide and lie in
// the L2 cache: one register-blocked kernel serves every product and its gradients, because the
// operand that is broadcast may be strided in any way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"
#include "common/sizes.h"

namespace dla::DLA_ISA {

// Element (m, k) of the broadcast operand is data[m * row + k * column].
template <class A>
struct Strided {
  const A* data;
  Size row, column;
};

// Elements (0, k) .. (rows - 1, k) of a broadcast operand, `rows` <= 16. One pointer for every four
// rows: base + {0, 1, 2, 3} strides are addresses that an instruction forms for nothing. The empty
// asm statements keep the compiler from rearranging this into more pointers than registers.
template <int rows, bool adjacent, class A>
class BroadcastColumn {
 public:
  explicit BroadcastColumn(Strided<A> a)
      : p0_(a.data),
        p1_(p0_ + 4 * a.row),
        p2_(p1_ + 4 * a.row),
        p3_(p2_ + 4 * a.row),
        row_(adjacent ? 1 : a.row),
        row3_(3 * row_),
        column_(a.column) {
    asm("" : "+r"(row3_));
  }

  A operator[](int m) const {
    if (adjacent) return p0_[m];
    const A* p = m < 4 ? p0_ : m < 8 ? p1_ : m < 12 ? p2_ : p3_;
    return m % 4 == 3 ? p[row3_] : p[m % 4 * row_];
  }

  void next() {
    advance(p0_);
    if constexpr (!adjacent && rows > 4) advance(p1_);
    if constexpr (!adjacent && rows > 8) advance(p2_);
    if constexpr (!adjacent && rows > 12) advance(p3_);
  }

 private:
  void advance(const A*& p) {
    p += column_;
    asm("" : "+r"(p));
  }

  const A *p0_, *p1_, *p2_, *p3_;
  Size row_, row3_, column_;
};

// c[m][j] += sum over k of a(m, k) b[k][j] for `rows` m and `vectors` whole vectors of j, of which
// the last has `tail` lanes. The sum over k is sequential in every element. `adjacent`: a.row is 1.
// Otherwise the next rows of a are fetched on the way, line by line: weights come from far when passes
// over maps lie between two evaluations of a cell.
template <int rows, int vectors, bool whole, bool adjacent, class A>
inline void multiply_block(Size depth, Strided<A> a, const A* b, Size b_stride, A* c, Size c_stride,
                           int tail) {
  constexpr int lanes = kLanes<A>;
  constexpr Size line = 64 / sizeof(A), pause = std::max<Size>(line / rows, 1);
  const auto columns = [&](int v) { return whole || v < vectors - 1 ? lanes : tail; };
  Vec<A> sums[rows][vectors];
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sums[m][v] = load_n(c + m * c_stride + v * lanes, columns(v));
  BroadcastColumn<rows, adjacent, A> column(a);
  for (Size k = 0; k < depth; ++k) {
    if (!adjacent && rows > 1 && k % pause == 0)
      __builtin_prefetch(a.data + (rows + k / pause % rows) * a.row + k / pause / rows * line);
    Vec<A> row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load_n(b + v * lanes, columns(v));
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[m][v] += column[m] * row[v];
    column.next();
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      store_n(c + m * c_stride + v * lanes, sums[m][v], columns(v));
}

// All rows of one group of vectors: blocks of `rows`, then of half as many, down to one.
template <int rows, int vectors, bool whole, bool adjacent, class A>
inline void multiply_rows(Size count, Size depth, Strided<A> a, const A* b, Size b_stride, A* c,
                          Size c_stride, int tail) {
  Size m = 0;
  for (; m + rows <= count; m += rows) {
    const Strided<A> block{a.data + m * a.row, a.row, a.column};
    multiply_block<rows, vectors, whole, adjacent>(depth, block, b, b_stride, c + m * c_stride,
                                                   c_stride, tail);
  }
  if constexpr (rows > 1) {
    if (m == count) return;
    const Strided<A> rest{a.data + m * a.row, a.row, a.column};
    multiply_rows<rows / 2, vectors, whole, adjacent>(count - m, depth, rest, b, b_stride,
                                                      c + m * c_stride, c_stride, tail);
  }
}

#if defined(__AVX512F__)
constexpr int kRowsOfPairs = 8, kRowsOfSingles = 16;  // of 32 registers
#else
constexpr int kRowsOfPairs = 4, kRowsOfSingles = 8;  // of 16 registers
#endif

template <bool adjacent, class A>
inline void multiply_columns(Size rows, Size columns, Size depth, Strided<A> a, const A* b,
                             Size b_stride, A* c, Size c_stride) {
  constexpr int lanes = kLanes<A>;
  Size j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes)
    multiply_rows<kRowsOfPairs, 2, true, adjacent>(rows, depth, a, b + j, b_stride, c + j, c_stride,
                                                lanes);
  if (j + lanes <= columns) {
    multiply_rows<kRowsOfSingles, 1, true, adjacent>(rows, depth, a, b + j, b_stride, c + j, c_stride,
                                                  lanes);
    j += lanes;
  }
  if (j < columns)
    multiply_rows<4, 1, false, adjacent>(rows, depth, a, b + j, b_stride, c + j, c_stride,
                                         static_cast<int>(columns - j));
}

// c[m] += sum over k of a[m * stride + k] b[k]: a column, and neighbours in memory are multiplied.
template <class A>
[[gnu::noinline]] void multiply_add_column(Size rows, Size depth, const A* a, Size stride,
                                           const A* b, A* c) {
  constexpr Size lanes = kLanes<A>;
  for (Size m = 0; m < rows; m += lanes) {
    const Size count = std::min(lanes, rows - m);
    Vec<A> sums[lanes] = {};
    for_vectors<A>(depth, [&](Size k, int n) {
      const Vec<A> column = load_n(b + k, n);
#pragma GCC unroll 16
      for (Size i = 0; i < lanes; ++i)  // where there are fewer rows, the last of them again
        sums[i] += load_n(a + (m + std::min(i, count - 1)) * stride + k, n) * column;
    });
    A totals[lanes];
    lane_sums<A>(sums, lanes, totals);
    const int n = static_cast<int>(count);
    store_n(c + m, load_n(c + m, n) + load(totals), n);
  }
}

// c[m][j] += sum over k of a(m, k) b[k][j], m < rows, j < columns, k < depth. One copy per type:
// inlined at every use it would fill the instruction cache and the compiler's time.
template <class A>
[[gnu::noinline]] void multiply_add(Size rows, Size columns, Size depth, Strided<A> a, const A* b,
                                    Size b_stride, A* c, Size c_stride) {
  if (columns == 1 && a.column == 1 && b_stride == 1 && c_stride == 1)
    return multiply_add_column(rows, depth, a.data, a.row, b, c);
  constexpr Size max_depth = 256;  // a block of b, two vectors wide, stays in the L1 cache
  for (Size k = 0; k < depth; k += max_depth) {
    const Size block = std::min(max_depth, depth - k);
    const Strided<A> part{a.data + k * a.column, a.row, a.column};
    const A* b_block = b + k * b_stride;
    if (a.row == 1) {
      multiply_columns<true>(rows, columns, block, part, b_block, b_stride, c, c_stride);
    } else {
      multiply_columns<false>(rows, columns, block, part, b_block, b_stride, c, c_stride);
    }
  }
}

}  // namespace dla::DLA_ISA
