// How vectors are laid over feature maps. Planes are worked on in groups, a vector at a time:
//   pixel lanes    a group is one plane of NCHW, a vector holds neighbouring pixels of a row;
//   channel lanes  a group is kLanes neighbouring channels, a vector holds these at one pixel.
// Either way the vector at a tap of a 3x3 filter lies dy rows and dx pixels from that at the centre,
// and a mask tells which of its lanes are within the map: nothing is padded, and most maps are read
// and written where they are. Only half-width types, which need converting, and NCHW maps too narrow
// for pixel lanes, which are transposed, go through working memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "args.h"
#include "simd.h"

namespace dla::DLA_ISA {

using std::int64_t;

struct MapShape {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t pixels() const { return height * width; }
  int64_t planes() const { return batch * channels; }
  int64_t row_elements() const { return channels_last ? width * channels : width; }
  // Offset of pixel (0, 0) of a plane.
  int64_t plane(int64_t b, int64_t c) const {
    return channels_last ? b * pixels() * channels + c : (b * channels + c) * pixels();
  }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch memory of one thread, aligned to cache lines, kept from call to call: fresh pages would
// cost more than the arithmetic on them.
class Arena {
 public:
  ~Arena() { std::free(base_); }
  void reserve(std::size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(base_);
    size_ = static_cast<std::size_t>(round_up(static_cast<int64_t>(bytes), 4096));
    base_ = static_cast<char*>(std::aligned_alloc(64, size_));
    if (base_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  template <class E>
  E* take(int64_t count) {
    E* out = reinterpret_cast<E*>(base_ + used_);
    used_ += bytes_of<E>(count);
    return out;
  }
  template <class E>
  static std::size_t bytes_of(int64_t count) {
    return static_cast<std::size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 64));
  }

 private:
  char* base_ = nullptr;
  std::size_t size_ = 0, used_ = 0;
};

// Rows [first, last) of a group of planes: what is worked on at a time.
struct Strip {
  int64_t first, last;
};

// Lanes within the map at the taps of a filter: [row above, the rows, row below][left, own, right].
template <class A>
struct TapMasks {
  Mask<A> at[3][3];
  Mask<A> centre() const { return at[1][1]; }
};

template <class A>
struct Grid {
  static constexpr int kV = kLanes<A>;
  MapShape shape;
  bool channel_lanes;
  int planes;           // planes of a group
  int64_t groups;       // groups of a sample
  int64_t together;     // groups that share cache lines and are worked on strip by strip
  int64_t vectors;      // vectors of a row
  int64_t strip_rows;   // rows that are worked on at a time
  bool safe_rows;       // a vector that starts in a row, or a pixel before it, ends in the next
  std::vector<Mask<A>> columns;  // [vectors][3]: lanes whose neighbour at dx = -1, 0, 1 is in the row

  explicit Grid(const MapShape& s) : shape(s) {
    // Pixel lanes need no transpose, but must be filled.
    const double pixels_filled =
        static_cast<double>(s.width) / static_cast<double>(round_up(s.width, kV));
    const double channels_filled =
        static_cast<double>(s.channels) / static_cast<double>(round_up(s.channels, kV));
    channel_lanes = s.channels_last || (pixels_filled < 0.7 && channels_filled > pixels_filled);
    planes = channel_lanes ? kV : 1;
    groups = ceil_div(s.channels, planes);
    together = s.channels_last ? 4 : 1;
    vectors = channel_lanes ? s.width : ceil_div(s.width, kV);
    const int64_t memory_row = s.channels_last ? s.row_elements() : row_stride();
    safe_rows = (channel_lanes ? kV : vectors * kV + 1 - s.width) <= memory_row;
    // A strip of six maps in the L1 cache.
    const int64_t row_bytes = row_stride() * static_cast<int64_t>(sizeof(A));
    const int64_t fitting = 48 * 1024 / (6 * row_bytes) / 8 * 8;
    strip_rows = std::min(s.height, std::max<int64_t>(8, fitting));
    fill_columns();
  }

  // Elements between rows, and for a strip and `halo` rows above and below it, of working memory.
  int64_t row_stride() const { return shape.width * planes; }
  int64_t strip_elements(int64_t halo) const { return (strip_rows + 2 * halo) * row_stride(); }

  int lanes(int64_t group) const {
    return static_cast<int>(std::min<int64_t>(planes, shape.channels - group * planes));
  }
  // Lanes of a group that stand for channels there are.
  Mask<A> channel_mask(int64_t group) const {
    const int count = channel_lanes ? lanes(group) : kV;
    return mask_where<A>([&](int lane) { return lane < count; });
  }

  // Masks of vector k in rows [row, row + count).
  TapMasks<A> masks(int64_t row, int64_t count, int64_t k, Mask<A> channels) const {
    const Mask<A> none{}, above = row > 0 ? channels : none,
                  below = row + count < shape.height ? channels : none;
    const Mask<A>* column = columns.data() + 3 * k;
    TapMasks<A> masks;
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      masks.at[0][j] = above & column[j];
      masks.at[1][j] = channels & column[j];
      masks.at[2][j] = below & column[j];
    }
    return masks;
  }

 private:
  void fill_columns() {
    for (int64_t k = 0; k < vectors; ++k)
      for (int dx = -1; dx <= 1; ++dx)
        columns.push_back(mask_where<A>([&](int lane) {
          const int64_t own = channel_lanes ? k : k * kV + lane;
          return own < shape.width && 0 <= own + dx && own + dx < shape.width;
        }));
  }
};

// Rows of a group of planes as vectors find them. Pixel lanes may have the strides along a row known to
// the compiler (kFixedStrides), which spares a good part of the instructions.
template <class A, bool kFixedStrides>
struct Window {
  A* origin;  // of row 0
  int64_t row_stride, stride_of_pixels, stride_of_vectors;
  std::ptrdiff_t ahead;  // bytes from what is read now to what should be fetched meanwhile

  explicit operator bool() const { return origin != nullptr; }
  int64_t pixel_stride() const { return kFixedStrides ? 1 : stride_of_pixels; }
  A* at(int64_t row, int64_t vector) const {
    return origin + row * row_stride + vector * (kFixedStrides ? kLanes<A> : stride_of_vectors);
  }
  operator Window<const A, kFixedStrides>() const {
    return {origin, row_stride, stride_of_pixels, stride_of_vectors, ahead};
  }
};

// A feature map of a type known at run time: the passes are compiled once per compute type.
template <class Pointer>
struct FeatureOf {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};
using Feature = FeatureOf<const void*>;
using OutFeature = FeatureOf<void*>;

// Calls body(T{}) with T the element type, one of those computed in A.
template <class A, class Body>
inline void with_storage(DType dtype, const Body& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(double{});
  } else {
    switch (dtype) {
      case DType::f16: return body(Half{});
      case DType::bf16: return body(BFloat16{});
      default: return body(float{});
    }
  }
}

// Copies between a feature and dense working memory. Full blocks of a transpose are kept apart: with
// all indices constant they stay in registers.
template <class T, class A>
struct Copy {
  static constexpr int kV = kLanes<A>;

  // Runs of `width` elements, `stride` elements apart in the feature, kV apart in memory.
  static void load_runs(const T* from, int64_t runs, int width, int64_t stride, A* to) {
    for (int64_t i = 0; i < runs; ++i) store(to + i * kV, load_n(from + i * stride, width));
  }
  static void store_runs(const A* from, int64_t runs, int width, int64_t stride, T* to) {
    for (int64_t i = 0; i < runs; ++i) store_n(to + i * stride, load(from + i * kV), width);
  }

  static void load_flat(const T* from, int64_t count, A* to) {
    load_runs(from, count / kV, kV, kV, to);
    const int64_t whole = count / kV * kV;
    if (whole < count)
      store_n(to + whole, load_n(from + whole, static_cast<int>(count - whole)),
              static_cast<int>(count - whole));
  }
  static void store_flat(const A* from, int64_t count, T* to) {
    store_runs(from, count / kV, kV, kV, to);
    const int64_t whole = count / kV * kV;
    if (whole < count)
      store_n(to + whole, load_n(from + whole, static_cast<int>(count - whole)),
              static_cast<int>(count - whole));
  }

  // Planes, `plane` elements apart in the feature, to the lanes of one vector per pixel.
  static void load_planes(const T* from, int64_t pixels, int lanes, int64_t plane, A* to) {
    int64_t f = 0;
    if (lanes == kV) {
      for (; f + kV <= pixels; f += kV) {
        Vec<A> block[kV];
#pragma GCC unroll 16
        for (int lane = 0; lane < kV; ++lane) block[lane] = load(from + lane * plane + f);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kV; ++i) store(to + (f + i) * kV, block[i]);
      }
    }
    for (; f < pixels; f += kV) {
      const int n = static_cast<int>(std::min<int64_t>(kV, pixels - f));
      Vec<A> block[kV] = {};
      for (int lane = 0; lane < lanes; ++lane) block[lane] = load_n(from + lane * plane + f, n);
      transpose<A>(block);
      for (int i = 0; i < n; ++i) store(to + (f + i) * kV, block[i]);
    }
  }
  static void store_planes(const A* from, int64_t pixels, int lanes, int64_t plane, T* to) {
    int64_t f = 0;
    if (lanes == kV) {
      for (; f + kV <= pixels; f += kV) {
        Vec<A> block[kV];
#pragma GCC unroll 16
        for (int i = 0; i < kV; ++i) block[i] = load(from + (f + i) * kV);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int lane = 0; lane < kV; ++lane) store(to + lane * plane + f, block[lane]);
      }
    }
    for (; f < pixels; f += kV) {
      const int n = static_cast<int>(std::min<int64_t>(kV, pixels - f));
      Vec<A> block[kV] = {};
      for (int i = 0; i < n; ++i) block[i] = load(from + (f + i) * kV);
      transpose<A>(block);
      for (int lane = 0; lane < lanes; ++lane) store_n(to + lane * plane + f, block[lane], n);
    }
  }
};

// A strip of a group of planes.
template <class A, bool kFixedStrides>
struct Place {
  using In = Window<const A, kFixedStrides>;
  using Out = Window<A, kFixedStrides>;

  const Grid<A>& grid;
  int64_t b, group;
  Strip strip;

  // A feature to be read, with up to `halo` rows above and below; in place or copied to `memory`.
  [[gnu::noinline]] In open(Feature feature, int64_t halo, A* memory) const {
    if (in_place(feature.dtype)) return on_feature(static_cast<const A*>(feature.data));
    const MapShape& s = grid.shape;
    const Strip rows = around(halo);
    const int64_t pixels = (rows.last - rows.first) * s.width;
    In window = on_memory(memory, rows.first);
    with_storage<A>(feature.dtype, [&](auto element) {
      using T = decltype(element);
      const T* from = static_cast<const T*>(feature.data) + offset(rows.first);
      window.ahead = reinterpret_cast<const char*>(from + grid.planes * s.pixels()) -
                     reinterpret_cast<const char*>(memory);
      if (s.channels_last)
        Copy<T, A>::load_runs(from, pixels, lanes(), s.channels, memory);
      else if (grid.channel_lanes)
        Copy<T, A>::load_planes(from, pixels, lanes(), s.pixels(), memory);
      else
        Copy<T, A>::load_flat(from, pixels, memory);
    });
    return window;
  }

  // ReLU(scale branch + shift + shortcut) with up to `halo` rows above and below, in `memory`. The
  // shortcut has been opened with as many; both are fetched a plane ahead from now on.
  [[gnu::noinline]] In open_joined(Feature branch, In& shortcut, Vec<A> scale, Vec<A> shift,
                                   int64_t halo, A* memory) const {
    const In from = open(branch, halo, memory);
    const Strip rows = around(halo);
    Out to = on_memory(memory, rows.first);
    const std::ptrdiff_t plane = grid.planes * grid.shape.pixels() * static_cast<int64_t>(sizeof(A));
    if (!in_place(branch.dtype)) {
      to.ahead = from.ahead;
    } else if (!grid.shape.channels_last) {
      to.ahead = reinterpret_cast<const char*>(from.at(rows.first, 0)) -
                 reinterpret_cast<const char*>(memory) + plane;
      shortcut.ahead = plane;
    }
    const auto joined = [&](Vec<A> one, Vec<A> other) {
      const Vec<A> sum = scale * one + (shift + other);
      return sum < A(0) ? Vec<A>{} : sum;  // NaN stays
    };
    if (grid.shape.channels_last && in_place(branch.dtype)) {
      const Mask<A> own = grid.channel_mask(group);
      for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t k = 0; k < grid.vectors; ++k)
          store(to.at(row, k), joined(load_masked<A>(from.at(row, k), own),
                                      load_masked<A>(shortcut.at(row, k), own)));
      return to;
    }
    const A *one = from.at(rows.first, 0), *other = shortcut.at(rows.first, 0);
    const int64_t count = (rows.last - rows.first) * grid.row_stride();
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>)
      store(memory + i, joined(load(one + i), load(other + i)));
    const int n = static_cast<int>(count - i);
    if (n > 0) store_n(memory + i, joined(load_n(one + i, n), load_n(other + i, n)), n);
    return to;
  }

  // A feature to be written, in place or in `memory` until close().
  Out open(OutFeature feature, A* memory) const {
    if (in_place(feature.dtype)) return on_feature(static_cast<A*>(feature.data));
    return on_memory(memory, strip.first);
  }
  [[gnu::noinline]] void close(OutFeature feature, const A* memory) const {
    if (in_place(feature.dtype)) return;
    const MapShape& s = grid.shape;
    const int64_t pixels = (strip.last - strip.first) * s.width;
    with_storage<A>(feature.dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(feature.data) + offset(strip.first);
      if (s.channels_last)
        Copy<T, A>::store_runs(memory, pixels, lanes(), s.channels, to);
      else if (grid.channel_lanes)
        Copy<T, A>::store_planes(memory, pixels, lanes(), s.pixels(), to);
      else
        Copy<T, A>::store_flat(memory, pixels, to);
    });
  }

  // Working memory that holds rows from `first_row` on.
  Out on_memory(A* memory, int64_t first_row) const {
    return {memory - first_row * grid.row_stride(), grid.row_stride(), grid.planes, kLanes<A>, 0};
  }

 private:
  Strip around(int64_t halo) const {
    return {std::max<int64_t>(0, strip.first - halo),
            std::min(grid.shape.height, strip.last + halo)};
  }
  bool in_place(DType dtype) const {
    const bool converted = dtype == DType::f16 || dtype == DType::bf16;
    return !converted && (grid.shape.channels_last || !grid.channel_lanes);
  }
  int lanes() const { return grid.lanes(group); }
  int64_t offset(int64_t row) const {
    return grid.shape.plane(b, group * grid.planes) + row * grid.shape.row_elements();
  }
  // Fetched meanwhile: the block of rows below, or the next group's lines beside these.
  template <class E>
  Window<E, kFixedStrides> on_feature(E* data) const {
    const MapShape& s = grid.shape;
    const int64_t ahead = s.channels_last ? kLanes<A> : 8 * s.width;
    return {data + offset(0), s.row_elements(), s.channels_last ? s.channels : 1,
            s.channels_last ? s.channels : kLanes<A>, ahead * static_cast<std::ptrdiff_t>(sizeof(A))};
  }
};

// Vector of per-channel numbers for a group: one channel in all lanes, or one channel per lane.
template <class A>
inline Vec<A> channel_vector(const A* per_channel, const Grid<A>& grid, int64_t group) {
  return grid.channel_lanes ? load_n(per_channel + group * grid.planes, grid.lanes(group))
                                  : splat(per_channel[group]);
}

// Writes back what channel_vector reads.
template <class A>
inline void store_channel_vector(A* per_channel, Vec<A> v, const Grid<A>& grid, int64_t group) {
  if (grid.channel_lanes)
    store_n(per_channel + group * grid.planes, v, grid.lanes(group));
  else
    per_channel[group] = v[0];
}

// Writes a vector of sums to per-channel numbers: over the lanes, or lane by lane.
template <class A>
inline void store_channel_sums(A* per_channel, Vec<A> v, const Grid<A>& grid, int64_t group) {
  if (grid.channel_lanes)
    store_n(per_channel + group * grid.planes, v, grid.lanes(group));
  else
    per_channel[group] = sum<A>(v);
}

}  // namespace dla::DLA_ISA
