// Tiles: a strip of rows of one group of planes, copied into a zero-padded scratch buffer of the
// compute type. One copy serves every memory format and feature type, and the padding removes all
// border cases from the stencils that follow.
//
// Two ways to put planes onto vector lanes:
//   columns   a group is one plane, a vector holds kLanes neighbouring columns of a row;
//   channels  a group is kLanes planes of one sample, a vector holds one pixel of each of them.
// Channels is natural for channels_last and, through a transpose in registers, serves NCHW maps
// that are too narrow to fill vectors with columns. Everything after the copy sees only two
// numbers: the distance to the next pixel and to the next row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

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

template <class A>
struct Tiling {
  static constexpr int kV = kLanes<A>;
  bool channel_lanes;
  int planes;            // planes of a group
  int64_t groups;        // groups of a sample
  int vectors;           // vectors of a row
  int tail;              // valid lanes of a row's last vector
  int64_t pixel_stride;  // elements between horizontal neighbours in the tile
  int64_t row_stride;    // elements between vertical neighbours in the tile
  int64_t strip_rows;    // rows that are worked on at a time
  Vec<A> tail_mask;      // 1 in the valid lanes of a row's last vector, 0 beyond

  explicit Tiling(const MapShape& s) {
    const double columns_filled =
        static_cast<double>(s.width) / static_cast<double>(round_up(s.width, kV));
    const double channels_filled =
        static_cast<double>(s.channels) / static_cast<double>(round_up(s.channels, kV));
    // Columns of NCHW need no transpose, but rows of one vector leave too little work per plane.
    channel_lanes = s.channels_last || 2 * s.width <= 3 * kV || columns_filled < 0.7;
    if (channels_filled < 0.5 * columns_filled) channel_lanes = s.channels_last;
    planes = channel_lanes ? kV : 1;
    groups = ceil_div(s.channels, planes);
    vectors = static_cast<int>(channel_lanes ? s.width : ceil_div(s.width, kV));
    tail = static_cast<int>(channel_lanes ? kV : s.width - (vectors - 1) * kV);
    pixel_stride = channel_lanes ? kV : 1;
    for (int i = 0; i < kV; ++i) tail_mask[i] = i < tail ? A(1) : A(0);
    // One pad pixel serves as right neighbour of its row and left neighbour of the next.
    row_stride = channel_lanes ? (s.width + 1) * kV : round_up(s.width + 1, kV);
    const int64_t budget = 24 * 1024 / (row_stride * static_cast<int64_t>(sizeof(A)));
    strip_rows = std::min(s.height, std::max<int64_t>(8, budget / 8 * 8));
  }

  Vec<A> mask(int vector) const {
    return vector == vectors - 1 ? tail_mask : splat(A(1));
  }
  int lanes(const MapShape& s, int64_t group) const {
    return channel_lanes ? static_cast<int>(std::min<int64_t>(kV, s.channels - group * kV)) : 1;
  }
  // Elements of a tile with `halo` rows above and below a strip.
  int64_t tile_elements(int halo) const {
    return kV + (strip_rows + 2 * halo) * row_stride + kV;
  }
};

// Rows [first, last) of a group of planes of sample b: what is worked on at a time.
struct Strip {
  int64_t b, group, first, last;
};

// Asks for cache lines a few at a time, spread through the arithmetic on other data. Without it
// memory waits while the processor computes and the other way round: the hardware's own prefetch
// starts anew at every plane.
class Prefetch {
 public:
  // `runs` stretches of `bytes` bytes, `stride` bytes apart.
  void aim(const char* start, int64_t runs, int64_t bytes, int64_t stride) {
    at_ = run_ = start;
    runs_ = runs;
    bytes_ = bytes;
    stride_ = stride;
  }
  void advance(int lines) {
    for (; runs_ > 0 && lines > 0; --lines) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (at_ - run_ < bytes_) continue;
      at_ = run_ += stride_;
      --runs_;
    }
  }

 private:
  const char *at_ = nullptr, *run_ = nullptr;
  int64_t runs_ = 0, bytes_ = 0, stride_ = 0;
};

// A tile's buffer and the map rows it holds: row r of the map starts at row(r).
template <class A>
struct Tile {
  A* base;
  int64_t row_stride;
  int64_t first_row;
  Prefetch next;  // the rows that the tile will hold next
  A* row(int64_t r) const { return base + (r - first_row) * row_stride; }
};

template <class A>
inline Tile<A> new_tile(Arena& arena, const Tiling<A>& tiling, int halo) {
  const int64_t elements = tiling.tile_elements(halo);
  A* buffer = arena.take<A>(elements);
  std::memset(buffer, 0, static_cast<std::size_t>(elements) * sizeof(A));
  return Tile<A>{buffer + kLanes<A>, tiling.row_stride, 0, {}};
}

namespace detail {

template <class A>
inline void zero_row(A* row, const Tiling<A>& tiling) {
  std::memset(row, 0, static_cast<std::size_t>(tiling.vectors) * kVectorBytes);
}

template <class T, class A>
inline void load_columns(const T* src, const MapShape& s, const Tiling<A>& t, int64_t rows, A* dst) {
  constexpr int V = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, src += s.width, dst += t.row_stride) {
    int k = 0;
    for (; k < t.vectors - 1; ++k) store(dst + k * V, load(src + k * V));
    store(dst + k * V, load_n(src + k * V, t.tail));
  }
}

template <class T, class A>
inline void store_columns(const A* src, const MapShape& s, const Tiling<A>& t, int64_t rows, T* dst) {
  constexpr int V = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, dst += s.width, src += t.row_stride) {
    int k = 0;
    for (; k < t.vectors - 1; ++k) store(dst + k * V, load(src + k * V));
    store_n(dst + k * V, load(src + k * V), t.tail);
  }
}

template <class T, class A>
inline void load_pixels(const T* src, const MapShape& s, const Tiling<A>& t, int64_t rows, int lanes,
                        A* dst) {
  constexpr int V = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, dst += t.row_stride) {
    if (lanes == V) {
      for (int64_t w = 0; w < s.width; ++w, src += s.channels) store(dst + w * V, load(src));
    } else {
      for (int64_t w = 0; w < s.width; ++w, src += s.channels)
        store(dst + w * V, load_n(src, lanes));
    }
  }
}

template <class T, class A>
inline void store_pixels(const A* src, const MapShape& s, const Tiling<A>& t, int64_t rows, int lanes,
                         T* dst) {
  constexpr int V = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, src += t.row_stride)
    for (int64_t w = 0; w < s.width; ++w, dst += s.channels)
      store_n(dst, load(src + w * V), lanes);
}

// Walks the pixels of consecutive rows of a channel-lane tile.
template <class A>
struct PixelWalk {
  A* at;
  int64_t column, width, row_gap;
  PixelWalk(A* start, const MapShape& s, int64_t row_stride)
      : at(start), column(0), width(s.width), row_gap(row_stride - s.width * kLanes<std::remove_const_t<A>>) {}
  void next() {
    at += kLanes<std::remove_const_t<A>>;
    if (++column == width) {
      column = 0;
      at += row_gap;
    }
  }
};

// Pixel f of `lanes` planes, n pixels on, to vectors of pixels. Full blocks are kept apart: with all
// indices constant they stay in registers.
template <class T, class A>
inline void load_transposed(const T* src, const MapShape& s, const Tiling<A>& t, int64_t rows,
                            int lanes, A* dst) {
  constexpr int V = kLanes<A>;
  const int64_t pixels = rows * s.width, plane = s.pixels();
  PixelWalk<A> walk(dst, s, t.row_stride);
  int64_t f = 0;
  if (lanes == V) {
    for (; f + V <= pixels; f += V) {
      Vec<A> block[V];
#pragma GCC unroll 16
      for (int lane = 0; lane < V; ++lane) block[lane] = load(src + lane * plane + f);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i, walk.next()) store(walk.at, block[i]);
    }
  }
  for (; f < pixels; f += V) {
    const int n = static_cast<int>(std::min<int64_t>(V, pixels - f));
    Vec<A> block[V] = {};
    for (int lane = 0; lane < lanes; ++lane) block[lane] = load_n(src + lane * plane + f, n);
    transpose<A>(block);
    for (int i = 0; i < n; ++i, walk.next()) store(walk.at, block[i]);
  }
}

template <class T, class A>
inline void store_transposed(const A* src, const MapShape& s, const Tiling<A>& t, int64_t rows,
                             int lanes, T* dst) {
  constexpr int V = kLanes<A>;
  const int64_t pixels = rows * s.width, plane = s.pixels();
  PixelWalk<const A> walk(src, s, t.row_stride);
  int64_t f = 0;
  if (lanes == V) {
    for (; f + V <= pixels; f += V) {
      Vec<A> block[V];
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i, walk.next()) block[i] = load(walk.at);
      transpose<A>(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < V; ++lane) store(dst + lane * plane + f, block[lane]);
    }
  }
  for (; f < pixels; f += V) {
    const int n = static_cast<int>(std::min<int64_t>(V, pixels - f));
    Vec<A> block[V] = {};
    for (int i = 0; i < n; ++i, walk.next()) block[i] = load(walk.at);
    transpose<A>(block);
    for (int lane = 0; lane < lanes; ++lane) store_n(dst + lane * plane + f, block[lane], n);
  }
}

}  // namespace detail

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

inline int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

template <class A>
void aim_at(Prefetch& prefetch, Feature feature, const MapShape& s, const Tiling<A>& t,
            const Strip& strip) {
  const int64_t size = element_size(feature.dtype), rows = strip.last - strip.first;
  const int64_t offset = s.plane(strip.b, strip.group * t.planes) + strip.first * s.row_elements();
  const char* start = static_cast<const char*>(feature.data) + offset * size;
  const int64_t lanes = t.lanes(s, strip.group);
  if (s.channels_last)
    prefetch.aim(start, rows * s.width, lanes * size, s.channels * size);
  else
    prefetch.aim(start, lanes, rows * s.width * size, s.pixels() * size);
}

// Copies the rows of a strip, and `halo` rows above and below it, into the tile; rows outside the
// map become zeros. Aims the tile's prefetch at the strip that follows.
template <class A>
void load_rows(Tile<A>& tile, Feature feature, const MapShape& s, const Tiling<A>& t,
               const Strip& strip, int halo, const Strip& next) {
  const int64_t first = strip.first - halo, last = strip.last + halo;
  tile.first_row = first;
  for (int64_t r = first; r < 0; ++r) detail::zero_row(tile.row(r), t);
  for (int64_t r = std::max(s.height, first); r < last; ++r) detail::zero_row(tile.row(r), t);
  const int64_t begin = std::max<int64_t>(0, first), rows = std::min(s.height, last) - begin;
  const int64_t offset = s.plane(strip.b, strip.group * t.planes) + begin * s.row_elements();
  const int lanes = t.lanes(s, strip.group);
  A* dst = tile.row(begin);
  with_storage<A>(feature.dtype, [&](auto element) {
    const auto* src = static_cast<const decltype(element)*>(feature.data) + offset;
    if (!t.channel_lanes) return detail::load_columns(src, s, t, rows, dst);
    if (s.channels_last) return detail::load_pixels(src, s, t, rows, lanes, dst);
    detail::load_transposed(src, s, t, rows, lanes, dst);
  });
  aim_at(tile.next, feature, s, t, next);
}

// Copies the rows of a strip from the tile to the feature.
template <class A>
void store_rows(const Tile<A>& tile, OutFeature feature, const MapShape& s, const Tiling<A>& t,
                const Strip& strip) {
  const int64_t offset = s.plane(strip.b, strip.group * t.planes) + strip.first * s.row_elements();
  const A* src = tile.row(strip.first);
  const int64_t rows = strip.last - strip.first;
  const int lanes = t.lanes(s, strip.group);
  with_storage<A>(feature.dtype, [&](auto element) {
    auto* dst = static_cast<decltype(element)*>(feature.data) + offset;
    if (!t.channel_lanes) return detail::store_columns(src, s, t, rows, dst);
    if (s.channels_last) return detail::store_pixels(src, s, t, rows, lanes, dst);
    detail::store_transposed(src, s, t, rows, lanes, dst);
  });
}

// Vector of per-channel numbers for a group: one channel in all lanes, or one channel per lane.
template <class A>
inline Vec<A> channel_vector(const A* per_channel, const MapShape& s, const Tiling<A>& t,
                             int64_t group) {
  return t.channel_lanes ? load_n(per_channel + group * t.planes, t.lanes(s, group))
                         : splat(per_channel[group]);
}

// Writes a vector of sums to per-channel numbers: over the lanes, or lane by lane.
template <class A>
inline void store_channel_sums(A* per_channel, Vec<A> v, const MapShape& s, const Tiling<A>& t,
                               int64_t group) {
  if (t.channel_lanes)
    store_n(per_channel + group * t.planes, v, t.lanes(s, group));
  else
    per_channel[group] = sum<A>(v);
}

}  // namespace dla::DLA_ISA
