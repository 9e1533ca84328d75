// How vectors are laid over feature maps. Planes are worked on in groups, a vector at a time:
//   pixel lanes    a group is one plane of NCHW, a vector holds neighbouring pixels of a row;
//   channel lanes  a group is kLanes neighbouring channels, a vector holds these at one pixel.
// Either way the vector at a tap of a 3x3 filter lies dy rows and dx pixels from that at the centre.
// Pixel lanes are read and written where they are, only half-width types go through working memory, to
// be converted; masks tell which lanes of a vector are within the map. Channel lanes that taps are
// taken of are copied to working memory (of NCHW maps, too narrow for pixel lanes, transposed) with
// zeros around them: the arithmetic then needs no masks, and knows the strides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "args.h"
#include "scratch.h"
#include "simd.h"
#include "sizes.h"

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

// Rows [first, last) of a group of planes: what is worked on at a time.
struct Strip {
  int64_t first, last;
};

// What surrounds some rows of a vector. For pixel lanes only, but for own(): channel lanes are
// surrounded by zeros.
template <class A>
struct Taps {
  Mask<A> masks[3];  // lanes within the map to the left, at the vector and to the right
  bool first, last;  // whether the map begins or ends with these rows
  const A* zeros;    // to be read beyond
  Mask<A> own() const { return masks[1]; }
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
  bool foreseen;        // small planes, one after the other: the processor itself fetches what is next
  std::vector<Mask<A>> columns;  // [vectors][3]: lanes whose neighbour at dx = -1, 0, 1 is in the row
  std::vector<A> zeros;          // a row, with a pixel before and after it
  std::vector<int64_t> offsets;  // channel lanes: of a strip's pixels in working memory

  explicit Grid(const MapShape& s) : shape(s) {
    // Pixel lanes need no transpose, but must be filled.
    const double pixels_filled =
        static_cast<double>(s.width) / static_cast<double>(round_up(s.width, kV));
    const double channels_filled =
        static_cast<double>(s.channels) / static_cast<double>(round_up(s.channels, kV));
    channel_lanes = !kTuned<A> || s.channels_last ||
                    (pixels_filled < 0.7 && channels_filled > pixels_filled);
    planes = channel_lanes ? kV : 1;
    groups = ceil_div(s.channels, planes);
    together = s.channels_last ? 4 : 1;
    vectors = channel_lanes ? s.width : ceil_div(s.width, kV);
    safe_rows = channel_lanes || vectors * kV + 1 - s.width <= s.width;
    foreseen = !channel_lanes && kVectorBytes == 64 &&
               s.pixels() * static_cast<int64_t>(sizeof(A)) <= 2048;
    // A strip of six maps in the L1 cache.
    const int64_t row_bytes = row_stride() * static_cast<int64_t>(sizeof(A));
    const int64_t fitting = 48 * 1024 / (6 * row_bytes) / 8 * 8;
    strip_rows = std::min(s.height, std::max<int64_t>(8, fitting));
    if (channel_lanes) {
      fill_offsets();
    } else {
      fill_columns();
      zeros.resize(vectors * kV + 2);
    }
  }

  // Elements between rows of working memory, and for a strip and `halo` rows above and below it.
  int64_t row_stride() const { return channel_lanes ? (shape.width + 2) * kV : shape.width; }
  int64_t strip_elements(int64_t halo) const { return (strip_rows + 2 * halo) * row_stride(); }

  int lanes(int64_t group) const {
    return static_cast<int>(std::min<int64_t>(planes, shape.channels - group * planes));
  }
  // Lanes of a group that stand for channels there are.
  Mask<A> channel_mask(int64_t group) const {
    const int count = channel_lanes ? lanes(group) : kV;
    return mask_where<A>([&](int lane) { return lane < count; });
  }
  // Lanes of vector k within the map.
  Mask<A> own(int64_t k, Mask<A> channels) const {
    return channel_lanes ? channels : columns[3 * k + 1];
  }
  // What surrounds vector k in rows [row, row + count).
  Taps<A> taps(int64_t row, int64_t count, int64_t k, Mask<A> channels) const {
    if (channel_lanes) return {{channels, channels, channels}, false, false, nullptr};
    const Mask<A>* column = columns.data() + 3 * k;
    return {{column[0], column[1], column[2]},
            row == 0,
            row + count == shape.height,
            zeros.data() + 1 + k * kV};
  }

 private:
  void fill_offsets() {
    constexpr int64_t most_halo = 2;
    for (int64_t row = 0; row < strip_rows + 2 * most_halo; ++row)
      for (int64_t k = 0; k < vectors; ++k) offsets.push_back(row * row_stride() + k * kV);
  }
  void fill_columns() {
    for (int64_t k = 0; k < vectors; ++k)
      for (int dx = -1; dx <= 1; ++dx)
        columns.push_back(mask_where<A>([&](int lane) {
          const int64_t own = k * kV + lane;
          return own < shape.width && 0 <= own + dx && own + dx < shape.width;
        }));
  }
};

// Steps from row to row. The empty asm keeps the compiler from precomputing the address of every row:
// it would have to put most of them aside.
template <class E>
struct RowCursor {
  E* at;
  std::ptrdiff_t stride;

  inline __attribute__((always_inline)) E* next() {
    E* row = at;
    at += stride;
    asm("" : "+r"(at));
    return row;
  }
};

// Where a strip lies in memory that is to be fetched meanwhile; strides in bytes.
struct Upcoming {
  const char* origin;
  std::ptrdiff_t row_stride, vector_stride;
  RowCursor<const char> rows(int64_t row, int64_t vector) const {
    return {origin + row * row_stride + vector * vector_stride, row_stride};
  }
};

// Rows of a group of planes as vectors find them.
template <class A, bool kPixelLanes>
struct Window {
  A* origin;  // of row 0
  int64_t row_stride, stride_of_vectors;
  Upcoming next;
  // Whether it is to be written past the caches. As wide as the rest: padding makes compilers copy windows
  // in odd pieces, which wait for each other.
  int64_t streamed = false;

  explicit operator bool() const { return origin != nullptr; }
  A* at(int64_t row, int64_t vector) const {
    return origin + row * row_stride + vector * (kPixelLanes ? kLanes<A> : stride_of_vectors);
  }
  // From a row on, at a vector.
  RowCursor<A> rows(int64_t row, int64_t vector) const { return {at(row, vector), row_stride}; }
  operator Window<const A, kPixelLanes>() const {
    return {origin, row_stride, stride_of_vectors, next};
  }
};

// Writes a vector.
template <class A, bool kPixelLanes>
inline void store_at(const Window<A, kPixelLanes>& to, int64_t row, int64_t k, Mask<A> own,
                     Vec<A> value) {
  if (to.streamed)
    stream(to.at(row, k), value);
  else
    store_masked<A>(to.at(row, k), value, own);
}

// A feature map of a type known at run time: the passes are compiled once per compute type.
template <class Pointer>
struct FeatureOf {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  explicit operator bool() const { return data != nullptr; }
};
using Feature = FeatureOf<const void*>;
struct OutFeature : FeatureOf<void*> {
  bool streamed = false;  // past the caches
};

// A map that a call writes once and does not read. If it is small, whoever reads it next may find it in a
// cache.
constexpr int64_t kLeastStreamed = kStreams ? 1 << 20 : INT64_MAX;  // bytes
inline OutFeature written_once(void* data, DType dtype, const MapShape& s) {
  return {{data, dtype}, s.planes() * s.pixels() * element_size(dtype) >= kLeastStreamed};
}

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

// Copies between a feature and working memory.
template <class T, class A>
struct Copy {
  static constexpr int kV = kLanes<A>;

  // Elements to the next cache line.
  static int64_t to_next_line(const T* p) {
    return static_cast<int64_t>(-reinterpret_cast<std::uintptr_t>(p) % kLineBytes / sizeof(T));
  }

  // Neighbouring elements.
  static void load_flat(const T* from, int64_t count, A* to) {
    for_vectors<A>(count, [&](int64_t i, int n) { store_n(to + i, load_n(from + i, n), n); });
  }
  static void store_flat(const A* from, int64_t count, T* to, bool streamed) {
    const int64_t head = streamed ? std::min(count, to_next_line(to)) : 0;
    for_vectors<A>(head, [&](int64_t i, int n) { store_n(to + i, load_n(from + i, n), n); });
    from += head, to += head;
    for_vectors<A>(count - head, [&](int64_t i, int n) {
      put_n(to + i, load_n(from + i, n), n, streamed);
    });
  }

  // Runs of `width` elements, `stride` elements apart in the feature; run i is a vector at offsets[i].
  static void load_runs(const T* from, int64_t runs, int width, int64_t stride, A* to,
                        const int64_t* offsets) {
    for (int64_t i = 0; i < runs; ++i) store(to + offsets[i], load_n(from + i * stride, width));
  }
  static void store_runs(const A* from, int64_t runs, int width, int64_t stride, T* to,
                         const int64_t* offsets, bool streamed) {
    streamed = streamed && are_lines(to, stride);
    for (int64_t i = 0; i < runs; ++i)
      put_n(to + i * stride, load(from + offsets[i]), width, streamed);
  }

  // Planes, `plane` elements apart in the feature, to the lanes of one vector per pixel. Full blocks of
  // the transpose are kept apart: with all indices constant they stay in registers. The last one may
  // lie over the one before.
  static void load_planes(const T* from, int64_t pixels, int lanes, int64_t plane, A* to,
                          const int64_t* offsets) {
    if (lanes == kV && pixels >= kV) {
      for (int64_t first = 0; first < pixels; first += kV) {
        const int64_t f = std::min(first, pixels - kV);
        Vec<A> block[kV];
#pragma GCC unroll 16
        for (int lane = 0; lane < kV; ++lane) block[lane] = load(from + lane * plane + f);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kV; ++i) store(to + offsets[f + i], block[i]);
      }
      return;
    }
    for (int64_t f = 0; f < pixels; f += kV) {
      const int n = static_cast<int>(std::min<int64_t>(kV, pixels - f));
      Vec<A> block[kV] = {};
      for (int lane = 0; lane < lanes; ++lane) block[lane] = load_n(from + lane * plane + f, n);
      transpose<A>(block);
      for (int i = 0; i < n; ++i) store(to + offsets[f + i], block[i]);
    }
  }
  static void store_planes(const A* from, int64_t pixels, int lanes, int64_t plane, T* to,
                           const int64_t* offsets, bool streamed) {
    if (lanes == kV && pixels >= kV) {
      streamed = streamed && pixels % kV == 0 && are_lines(to, plane);
      for (int64_t first = 0; first < pixels; first += kV) {
        const int64_t f = std::min(first, pixels - kV);
        Vec<A> block[kV];
#pragma GCC unroll 16
        for (int i = 0; i < kV; ++i) block[i] = load(from + offsets[f + i]);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int lane = 0; lane < kV; ++lane)
          put_n(to + lane * plane + f, block[lane], kV, streamed);
      }
      return;
    }
    for (int64_t f = 0; f < pixels; f += kV) {
      const int n = static_cast<int>(std::min<int64_t>(kV, pixels - f));
      Vec<A> block[kV] = {};
      for (int i = 0; i < n; ++i) block[i] = load(from + offsets[f + i]);
      transpose<A>(block);
      for (int lane = 0; lane < lanes; ++lane) store_n(to + lane * plane + f, block[lane], n);
    }
  }
};

// Whether a pass fetches the next strip, to the L2 cache, or the rows below, to the L1 cache: pixel lanes
// of narrower vectors have more to do per line, and wait longer for what is not in the L1 cache.
template <bool kPixelLanes>
constexpr bool kFetchesStrips = !kPixelLanes || kVectorBytes == 64;

// A strip of a group of planes.
template <class A, bool kPixelLanes>
struct Place {
  using In = Window<const A, kPixelLanes>;
  using Out = Window<A, kPixelLanes>;

  const Grid<A>& grid;
  int64_t b, group;
  Strip strip;
  int64_t start;  // where it begins, in elements of a map
  int64_t ahead;  // elements from there to the strip that is next

  // A feature to be read, with up to `halo` rows above and below; in place or copied to `memory`. Null if
  // there is none. Inlined, and best made where it stays: copies of windows are read in pieces other than
  // they were written in, and these wait.
  inline __attribute__((always_inline)) In open(Feature feature, int64_t halo, A* memory) const {
    if (!feature) return {};
    if (in_place(feature.dtype)) return on_feature(as<A>(feature.data));
    return copy(feature, halo, memory);
  }

  // The same if taps are to be taken, unless all that is `wanted` of them is the centre.
  inline __attribute__((always_inline)) In open_bordered(Feature feature, int64_t halo, A* memory,
                                                         bool wanted = true) const {
    if (kPixelLanes || !wanted || !feature) return open(feature, halo, memory);
    clear_border(memory, halo);
    return copy(feature, halo, memory);
  }

  // ReLU(scale branch + shift + shortcut), bordered, in `memory`. The shortcut has been opened with as
  // many rows above and below.
  [[gnu::noinline]] In open_joined(Feature branch, const In& shortcut, Vec<A> scale, Vec<A> shift,
                                   int64_t halo, A* memory) const {
    const In from = open(branch, halo, memory);
    const Strip rows = around(halo);
    Out to = on_memory(memory, strip.first - halo);
    to.next = from.next;
    const auto joined = [&](Vec<A> one, Vec<A> other) {
      const Vec<A> sum = scale * one + (shift + other);
      return sum < A(0) ? Vec<A>{} : sum;  // NaN stays
    };
    if constexpr (kPixelLanes) {
      A* result = to.at(rows.first, 0);
      const A *one = from.at(rows.first, 0), *other = shortcut.at(rows.first, 0);
      for_vectors<A>((rows.last - rows.first) * grid.row_stride(), [&](int64_t i, int n) {
        store_n(result + i, joined(load_n(one + i, n), load_n(other + i, n)), n);
      });
    } else {
      const Mask<A> own = grid.channel_mask(group);
      for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t k = 0; k < grid.vectors; ++k)
          store(to.at(row, k), joined(load_masked<A>(from.at(row, k), own),
                                      load_masked<A>(shortcut.at(row, k), own)));
      clear_border(memory, halo);
    }
    return to;
  }

  // A feature to be written, in place or in `memory` until close().
  inline __attribute__((always_inline)) Out open(OutFeature feature, A* memory) const {
    if (!written_in_place(feature)) return on_memory(memory, strip.first);
    Out to = on_feature(as<A>(feature.data));
    to.streamed = feature.streamed && has_whole_lines(feature);
    return to;
  }
  [[gnu::noinline]] void close(OutFeature feature, A* memory) const {
    if (written_in_place(feature)) return;
    const MapShape& s = grid.shape;
    const int64_t pixels = (strip.last - strip.first) * s.width;
    const A* from = on_memory(memory, strip.first).at(strip.first, 0);
    with_storage<A>(feature.dtype, [&](auto element) {
      using T = decltype(element);
      T* to = as<T>(feature.data) + offset(strip.first);
      if constexpr (kPixelLanes)
        Copy<T, A>::store_flat(from, pixels, to, feature.streamed);
      else if (s.channels_last)
        Copy<T, A>::store_runs(from, pixels, lanes(), s.channels, to, grid.offsets.data(),
                               feature.streamed);
      else
        Copy<T, A>::store_planes(from, pixels, lanes(), s.pixels(), to, grid.offsets.data(),
                                 feature.streamed);
    });
  }

  // The strip that is so many elements of a map further on.
  Upcoming further_on(Feature feature, int64_t elements) const {
    const MapShape& s = grid.shape;
    const int64_t size = element_size(feature.dtype);
    // Planes that are transposed are fetched as a whole, in whatever order.
    const int64_t vector = s.channels_last ? s.channels : kLanes<A>;
    const int64_t row = kPixelLanes || s.channels_last ? s.row_elements() : s.width * vector;
    const int64_t origin = start + elements - strip.first * row;
    return {as<char>(feature.data) + origin * size, row * size, vector * size};
  }

  // Working memory that holds rows from `first_row` on.
  Out on_memory(A* memory, int64_t first_row) const {
    const int64_t border = kPixelLanes ? 0 : kLanes<A>;
    return {memory + border - first_row * grid.row_stride(), grid.row_stride(), kLanes<A>, {}};
  }

  // In working memory for the strip and `halo` rows above and below: zeros wherever the map is not.
  void clear_border(A* memory, int64_t halo) const {
    if (kPixelLanes) return;
    const Out window = on_memory(memory, strip.first - halo);
    for (int64_t row = strip.first - halo; row < strip.last + halo; ++row) {
      const bool within = 0 <= row && row < grid.shape.height;
      const int64_t step = within ? grid.vectors + 1 : 1;
      for (int64_t k = -1; k <= grid.vectors; k += step) store(window.at(row, k), Vec<A>{});
    }
  }

 private:
  [[gnu::noinline]] In copy(Feature feature, int64_t halo, A* memory) const {
    const MapShape& s = grid.shape;
    const Strip rows = around(halo);
    const int64_t pixels = (rows.last - rows.first) * s.width;
    Out window = on_memory(memory, strip.first - halo);
    A* to = window.at(rows.first, 0);
    with_storage<A>(feature.dtype, [&](auto element) {
      using T = decltype(element);
      const T* from = as<T>(feature.data) + offset(rows.first);
      if constexpr (kPixelLanes)
        Copy<T, A>::load_flat(from, pixels, to);
      else if (s.channels_last)
        Copy<T, A>::load_runs(from, pixels, lanes(), s.channels, to, grid.offsets.data());
      else
        Copy<T, A>::load_planes(from, pixels, lanes(), s.pixels(), to, grid.offsets.data());
    });
    window.next = further_on(feature, ahead);
    return window;
  }

  Strip around(int64_t halo) const {
    return {std::max<int64_t>(0, strip.first - halo),
            std::min(grid.shape.height, strip.last + halo)};
  }
  bool in_place(DType dtype) const {
    const bool converted = dtype == DType::f16 || dtype == DType::bf16;
    return !converted && (kPixelLanes || grid.shape.channels_last);
  }
  // Rows that are not whole cache lines are streamed from working memory. That is not worth while for
  // small planes: they would be read there before they have arrived.
  bool written_in_place(OutFeature feature) const {
    if (!in_place(feature.dtype)) return false;
    const bool small = grid.shape.pixels() * static_cast<int64_t>(sizeof(A)) < 2048;
    return !feature.streamed || has_whole_lines(feature) || !kPixelLanes || small;
  }
  bool has_whole_lines(OutFeature feature) const {
    const MapShape& s = grid.shape;
    return are_lines(as<A>(feature.data), kPixelLanes ? s.width : s.channels);
  }
  int lanes() const { return grid.lanes(group); }
  int64_t offset(int64_t row) const {
    return start + (row - strip.first) * grid.shape.row_elements();
  }
  template <class E>
  Window<E, kPixelLanes> on_feature(E* data) const {
    const int64_t vector = kPixelLanes ? kLanes<A> : grid.shape.channels;
    const DType dtype = sizeof(A) == sizeof(double) ? DType::f64 : DType::f32;
    const int64_t row = grid.shape.row_elements();
    const int64_t distance = kFetchesStrips<kPixelLanes> ? ahead : 8 * row;
    return {data + offset(0), row, vector, further_on(Feature{data, dtype}, distance)};
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
