// Working panels: a few rows of the batch laid out for the products of a cell. A panel of n values
// per row has Form::size(n) elements; pointwise functions run over it as over a flat array.
#pragma once

#include <algorithm>

#include "common/gemm.h"

namespace dla::DLA_ISA {

// n rounded up to whole vectors.
template <class A>
constexpr Size whole_vectors(Size n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// `count` rows of a row-major matrix; stride 0 repeats one row.
template <class A>
struct Rows {
  A* data;
  Size stride, count;

  Rows from(Size column) const { return {data + column, stride, count}; }
};

// Panel [n][width]: every lane is a row of the batch. Weights are broadcast just as they lie in
// memory, forward or transposed, nothing is summed across lanes and no width leaves a remainder.
// Unused lanes are zero.
template <class A, int tiles>
struct Lanes {
  static constexpr Size width = tiles * kLanes<A>;
  static constexpr Size size(Size n) { return n * width; }

  static void pack(Rows<const A> rows, Size n, A* panel) {
    for_squares(rows.count, n, [&](Size row, Size column, int height, int columns) {
      Vec<A> square[kLanes<A>];
      for (int i = 0; i < kLanes<A>; ++i)
        square[i] = i < height ? load_n(rows.data + (row + i) * rows.stride + column, columns)
                               : Vec<A>{};
      transpose<A>(square);
      for (int i = 0; i < columns; ++i) store(panel + (column + i) * width + row, square[i]);
    });
  }

  // The other way: rows = panel, or rows += panel.
  template <bool add>
  static void unpack(const A* panel, Size n, Rows<A> rows) {
    for_squares(rows.count, n, [&](Size row, Size column, int height, int columns) {
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

  // panel[i] = value(i) in every row.
  template <class Value>
  static void fill(Size n, Value&& value, A* panel) {
    for (Size i = 0; i < n; ++i) std::fill_n(panel + i * width, width, value(i));
  }

  // out += w in, w [n, depth] with rows w_stride apart.
  static void multiply(Size n, Size depth, const A* w, Size w_stride, const A* in, A* out) {
    multiply_add<A>(n, width, depth, {w, w_stride, 1}, in, width, out, width);
  }

 private:
  // body(first row, first column, height <= lanes, columns <= lanes) over all tiles.
  template <class Body>
  static void for_squares(Size count, Size n, Body&& body) {
    constexpr Size lanes = kLanes<A>;
    for (Size row = 0; row < width; row += lanes)
      for (Size column = 0; column < n; column += lanes)
        body(row, column, static_cast<int>(std::clamp(count - row, Size{0}, lanes)),
             static_cast<int>(std::min(lanes, n - column)));
  }
};

// Panel [n] of a single row, padded with zeros to whole vectors: for batches too small to fill
// lanes.
template <class A>
struct Single {
  static constexpr Size width = 1;
  static constexpr Size size(Size n) { return whole_vectors<A>(n); }

  static void pack(Rows<const A> rows, Size n, A* panel) {
    std::copy_n(rows.data, n, panel);
    std::fill(panel + n, panel + size(n), A(0));
  }

  template <bool add>
  static void unpack(const A* panel, Size n, Rows<A> rows) {
    static_assert(!add, "single rows go forward only");
    std::copy_n(panel, n, rows.data);
  }

  template <class Value>
  static void fill(Size n, Value&& value, A* panel) {
    for (Size i = 0; i < n; ++i) panel[i] = value(i);
    std::fill(panel + n, panel + size(n), A(0));
  }

  static void multiply(Size n, Size depth, const A* w, Size w_stride, const A* in, A* out) {
    multiply_add_vector<A>(n, depth, w, w_stride, in, out);
  }
};

}  // namespace dla::DLA_ISA
