// How the numbers of a batch are laid out for the products of a cell. A panel holds n values of a
// group of rows of the batch as [n][width]: every lane is a row. Weights are then broadcast just as
// they lie in memory, forward or transposed, nothing is summed across lanes, and no number of
// channels leaves a remainder. Lanes without a row hold zeros, or what is computed from zeros.
// Of few rows, most lanes would be such. Forward, a row then is a group of its own, of width 1: weights
// are multiplied where they lie and summed across lanes. What then lies behind the last value, up to a
// whole vector, is arbitrary and leads to nothing.
#pragma once

#include <algorithm>

#include "common/gemm.h"

namespace dla::DLA_ISA::cell_detail {

// The groups that a batch is divided into: two vectors, so that the products use every broadcast
// twice.
template <class A>
struct Groups {
  static constexpr Size lanes = kLanes<A>;
  Size rows, width, count;

  Groups(Size rows, bool single)
      : rows(rows),
        width(single ? 1 : rows <= lanes ? lanes : 2 * lanes),
        count(ceil_div(rows, width)) {}

  bool single() const { return width == 1; }
  Size first_row(Size group) const { return group * width; }
  Size rows_in(Size group) const { return std::min(width, rows - first_row(group)); }
  // Whole vectors that hold rows.
  Size columns(Size group) const { return single() ? 1 : round_up(rows_in(group), lanes); }
  // Elements of n values of a group: whole vectors.
  Size size(Size n) const { return round_up(n * width, lanes); }
};

// Panels of all groups, for n values per row and whole vectors.
template <class A>
struct Panels {
  A* data;
  Size n, width;

  // From value i on.
  A* of(Size group, Size i = 0) const { return data + (group * n + i) * width; }
};

// `count` rows of a row-major matrix; stride 0 repeats one row, data null stands for none.
template <class A>
struct Rows {
  A* data;
  Size stride, count;

  Rows from(Size column) const { return {data + column, stride, count}; }
};

// body(first row, first column, height <= lanes, columns <= lanes) over the squares that a panel is
// transposed in.
template <class A, class Body>
inline void for_squares(Size width, Size count, Size n, const Body& body) {
  constexpr Size lanes = kLanes<A>;
  for (Size row = 0; row < width; row += lanes)
    for (Size column = 0; column < n; column += lanes)
      body(row, column, static_cast<int>(std::clamp(count - row, Size{0}, lanes)),
           static_cast<int>(std::min(lanes, n - column)));
}

template <class A>
[[gnu::noinline]] void pack(Rows<const A> rows, Size n, Size width, A* panel) {
  if (width == 1) return static_cast<void>(std::copy_n(rows.data, n, panel));
  for_squares<A>(width, rows.count, n, [&](Size row, Size column, int height, int columns) {
    Vec<A> square[kLanes<A>];
    const A* from = rows.data + row * rows.stride + column;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      square[i] = i < height ? load_n(from + i * rows.stride, columns) : Vec<A>{};
    transpose<A>(square);
    A* to = panel + column * width + row;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (i < columns) store(to + i * width, square[i]);
  });
}

// The other way: rows = panel, or rows += panel (not of width 1).
template <bool add, class A>
[[gnu::noinline]] void unpack(const A* panel, Size n, Size width, Rows<A> rows) {
  if (!add && width == 1) return static_cast<void>(std::copy_n(panel, n, rows.data));
  for_squares<A>(width, rows.count, n, [&](Size row, Size column, int height, int columns) {
    Vec<A> square[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i)
      square[i] = i < columns ? load(panel + (column + i) * width + row) : Vec<A>{};
    transpose<A>(square);
    for (int i = 0; i < height; ++i) {
      A* to = rows.data + (row + i) * rows.stride + column;
      store_n(to, add ? load_n(to, columns) + square[i] : square[i], columns);
    }
  });
}

// out[i] += the sum of value i over all rows.
template <class A>
[[gnu::noinline]] void add_row_sums(const A* panel, Size n, Size width, A* out) {
  constexpr Size lanes = kLanes<A>;
  for (Size first = 0; first < n; first += lanes) {
    const int count = static_cast<int>(std::min(lanes, n - first));
    Vec<A> sums[lanes];
    for (int i = 0; i < count; ++i) {
      const A* row = panel + (first + i) * width;
      sums[i] = load(row);
      for (Size lane = lanes; lane < width; lane += lanes) sums[i] += load(row + lane);
    }
    A totals[lanes];
    lane_sums<A>(sums, count, totals);
    store_n(out + first, load_n(out + first, count) + load(totals), count);
  }
}

}  // namespace dla::DLA_ISA::cell_detail
