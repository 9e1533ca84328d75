// How the threads of a grid share out a dense feature map for kernels that look at the neighbours
// of a pixel. A block copies the pixels that it needs to shared memory, 16 bytes at a time and all
// at once; then a thread takes some columns of one channel, and walks down some of their rows.
//   NCHW           a block has whole planes, several of small ones, or a strip of rows of one; they
//                  lie as in memory, so that rows of any length are copied in packs;
//   channels_last  a block has 32 bytes of channels side by side, of a window of pixels.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

constexpr int kTileThreads = 128;       // of a block
constexpr int kTileBytes = 40 * 1024;   // shared memory for maps: several blocks to a processor
// Of a thread. 56, 28, 14 and 7 are multiples of 7; and as it is odd, threads that take turns along
// a line or a plane find their pixels in different banks of shared memory. For doubles registers
// would not suffice.
template <class A>
constexpr int kColumns = sizeof(A) == 8 ? 3 : 7;

// Channels that lie side by side in a block, and that threads side by side have: a sector of the
// cache. With more of them windows would be smaller, and more of what is read around them.
template <class T, bool channels_last>
constexpr int kSide = channels_last ? 32 / static_cast<int>(sizeof(T)) : 1;

// What blocks and threads get of a map. A kernel needs `halo` rows and columns around its own.
struct Tiling {
  Size batch, channels;
  int height, width, halo;
  bool packs;                 // copied 16 bytes at a time
  int groups = 1;             // times kSide channels, of a block
  int rows = 0, columns = 0;  // of a block
  int strips = 0, windows = 0;  // blocks down and across a plane
  int across = 0, down = 0;   // threads that share the columns and rows of a block
  Size sets = 0, blocks = 0;  // blocks side by side across the channels; all together
  int buffer = 0;             // elements of a map in shared memory, the last of them
  int zeros = 0;              // a row of zeros

  // Sums of blocks are arrays [batch, pieces(), channels].
  DLA_HOST_DEVICE Size pieces() const { return static_cast<Size>(strips) * windows; }
};

// ---- host ---------------------------------------------------------------------------------------

// Pixels of n, if they and what is around them are to be at most `most`; a multiple of `step`.
inline int pixels_within(int n, int halo, Size most, int step) {
  if (n <= most) return n;
  const Size within = (most - 2 * halo) / step * step;
  return within < step ? step : static_cast<int>(within);
}

// The same, shared out evenly.
inline int even_share(int n, int most, int step) {
  return static_cast<int>(ceil_div(ceil_div(n, ceil_div(n, most)), step) * step);
}

// For a kernel with `bytes` of shared memory for every pixel, that reads and writes `maps`.
template <class T, bool channels_last>
Tiling tile_map(Size batch, Size channels, Size height, Size width, int halo, int bytes,
                std::initializer_list<const void*> maps) {
  constexpr int side = kSide<T, channels_last>, columns = kColumns<Compute<T>>;
  Tiling plan{batch, channels, static_cast<int>(height), static_cast<int>(width), halo, false};
  const int lines = std::min(plan.height, 1 + 2 * halo);  // at the least
  const Size most_columns = std::min<Size>(kTileBytes / (lines * side * bytes),
                                           channels_last ? 2 * columns + 2 * halo
                                                         : kTileThreads * columns);
  plan.columns = plan.width;
  if (plan.width > most_columns)
    plan.columns = even_share(plan.width, pixels_within(plan.width, halo, most_columns, columns),
                              columns);
  const int line = std::min(plan.width, plan.columns + 2 * halo) * side * bytes;
  plan.rows = even_share(plan.height, pixels_within(plan.height, halo, kTileBytes / line, 1), 1);
  plan.strips = static_cast<int>(ceil_div(height, plan.rows));
  plan.windows = static_cast<int>(ceil_div(width, plan.columns));
  plan.across = static_cast<int>(ceil_div(plan.columns, columns));
  const int staged = std::min(plan.height, plan.rows + 2 * halo) * (line / bytes);
  const Size of_sets = channels_last ? channels : batch * channels;
  if (plan.pieces() == 1)
    while (2 * plan.groups * staged * bytes <= kTileBytes && plan.groups * side < of_sets &&
           2 * plan.groups * side * plan.across <= kTileThreads)
      plan.groups *= 2;
  plan.down = std::max(1, kTileThreads / (side * plan.across * plan.groups));
  plan.sets = ceil_div(of_sets, plan.groups * side);
  plan.blocks = plan.sets * plan.pieces() * (channels_last ? batch : 1);
  // In NCHW the first pack may begin before the first pixel.
  const auto whole_packs = [](int n) { return (n + kPack<T> - 1) / kPack<T> * kPack<T>; };
  plan.zeros = whole_packs(plan.groups * staged + (channels_last ? 0 : kPack<T> - 1));
  plan.buffer = plan.zeros + whole_packs((columns + 2) * side);
  plan.packs = aligned_to_packs(maps) &&
               (channels_last ? channels % kPack<T> == 0 : plan.windows == 1);
  return plan;
}

// Calls body(true type or false type) for a memory format.
template <class Body>
void with_format(bool channels_last, const Body& body) {
  if (channels_last)
    body(std::true_type{});
  else
    body(std::false_type{});
}

template <class T>
Tiling tile_map(bool channels_last, Size batch, Size channels, Size height, Size width, int halo,
                int bytes, std::initializer_list<const void*> maps) {
  Tiling plan{};
  with_format(channels_last, [&](auto last) {
    plan = tile_map<T, last.value>(batch, channels, height, width, halo, bytes, maps);
  });
  return plan;
}

inline Grid tile_grid(const Tiling& plan, int bytes) {
  return {plan.blocks, kTileThreads, static_cast<std::size_t>(plan.buffer) * bytes};
}

// Bytes of a pixel of all maps that there are.
template <class T>
int bytes_of(std::initializer_list<const void*> maps) {
  const auto missing = std::count(maps.begin(), maps.end(), nullptr);
  return static_cast<int>(sizeof(T) * (maps.size() - missing));
}

// ---- device -------------------------------------------------------------------------------------

// A row of pixels of a thread, with those beside it.
template <class A>
using Row = A[kColumns<A> + 2];

// What a block and a thread do. Pixels outside of the map are zeros.
template <class T, bool channels_last>
struct Tile {
  using A = Compute<T>;
  static constexpr int side = kSide<T, channels_last>, columns = kColumns<A>;

  const Tiling& plan;
  Size sample, channel, plane;  // of the thread
  bool exists;                  // whether it has a channel
  Size piece;                   // place of the block's sums in [batch, pieces, channels]
  int first_row, last_row;      // of the block
  int column, count;            // the thread's first of `count`
  int begin, end;               // its rows
  bool has_left, has_right;     // columns beside its own

  __device__ explicit Tile(const Tiling& plan) : plan(plan) {
    const int thread = static_cast<int>(threadIdx.x);
    unsigned block = blockIdx.x;
    const auto take = [&](Size count) {
      const unsigned i = block % static_cast<unsigned>(count);
      block /= static_cast<unsigned>(count);
      return static_cast<int>(i);
    };
    const int set = channels_last ? take(plan.sets) : 0;
    const int window = take(plan.windows), strip = take(plan.strips);
    first_row = strip * plan.rows;
    last_row = min_of(first_row + plan.rows, plan.height);
    first_column_ = window * plan.columns;
    last_column_ = min_of(first_column_ + plan.columns, plan.width);
    top_ = max_of(first_row - plan.halo, 0);
    bottom_ = min_of(last_row + plan.halo, plan.height);
    left_ = max_of(first_column_ - plan.halo, 0);
    right_ = min_of(last_column_ + plan.halo, plan.width);
    line_ = right_ - left_;
    pixels_ = line_ * (bottom_ - top_);
    const Size number = block;  // of a sample, or of the planes of a block
    const Size all = channels_last ? plan.channels : plan.batch * plan.channels;
    first_ = static_cast<Size>(channels_last ? set : number) * plan.groups * side;
    const Size left = all - first_;
    planes_ = left < plan.groups * side ? static_cast<int>(left) : plan.groups * side;
    const Size area = static_cast<Size>(plan.height) * plan.width;
    origin_ = channels_last ? number * area * plan.channels + first_ : first_ * area;
    if (!channels_last && plan.packs)
      phase_ = static_cast<int>((origin_ + static_cast<Size>(top_) * plan.width) % kPack<T>);
    take_share(thread);
    sample = channels_last ? number : (first_ + own_) / plan.channels;
    channel = channels_last ? first_ + own_ : (first_ + own_) % plan.channels;
    plane = sample * plan.channels + channel;
    piece = (sample * plan.pieces() + strip * plan.windows + window) * plan.channels + channel;
  }

  // Where a pixel of the thread's channel lies in memory, and in a buffer.
  __device__ Size offset(int row, int column) const { return offset_of(own_, row, column); }
  __device__ int place(int row, int column) const {
    return base_ + (row * line_ + column) * side;
  }
  __device__ bool has_row(int row) const { return row >= 0 && row < plan.height; }
  __device__ bool has_column(int column) const { return column >= 0 && column < plan.width; }
  __device__ bool whole() const { return count == columns; }
  // Whether there is a pixel in column e of a Row.
  __device__ bool has(int e) const {
    if (e == 0) return has_left;
    if (e == columns + 1) return has_right;
    return whole() || e <= count;
  }

  // One thread of every plane: of the first of its blocks.
  __device__ bool leads() const { return exists && column == 0 && begin == 0; }

  // The row of zeros of a buffer, which stands for rows outside of the map.
  template <class V>
  __device__ void clear(Shared<V> buffer) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (columns + 2) * side; i += kTileThreads)
      buffer[plan.zeros + i] = V{};
  }

  // The block's part of a map, with `halo` rows more, on its way to a buffer.
  __device__ void fetch(const T* map, Shared<T> buffer, int halo) const {
    const int from = max_of(first_row - halo, 0), to = min_of(last_row + halo, plan.height);
    if (!plan.packs) {
      each_pixel(from, to, left_, right_, [&](int plane, int row, int column) {
        buffer[place_of(plane, row, column)] = map[offset_of(plane, row, column)];
      });
    } else if constexpr (channels_last) {
      fetch_pixels(map, buffer, from, to);
    } else {
      const Span span = span_of(from, to);
      const T* const begin = map + span.start;
      const Size size = plan.batch * plan.channels * plan.height * plan.width - span.start;
      const int room = size < plan.zeros ? static_cast<int>(size) : plan.zeros;
      each_pack(span, [&](int at) {
        if (at + kPack<T> <= room) return copy_pack(begin + at, buffer + at);
#pragma unroll 1
        for (int i = at; i < span.last; ++i) buffer[i] = begin[i];
      });
    }
  }

  // The thread's columns of a row, in a buffer that was fetched; with `sides` those beside, too.
  template <class V>
  __device__ void read(Shared<V> buffer, int row, Row<A>& values, bool sides = true) const {
    const int at = has_row(row) ? place(row, column) : plan.zeros + side;
    if (whole()) {
#pragma unroll
      for (int e = 1; e <= columns; ++e) values[e] = number<V>(buffer, at + (e - 1) * side);
    } else {
#pragma unroll
      for (int e = 1; e <= columns; ++e)
        values[e] = e <= count ? number<V>(buffer, at + (e - 1) * side) : A(0);
    }
    if (!sides) return;
    // Where there is no such column, any pixel is read: cheaper than to branch.
    const A left = number<V>(buffer, has_left ? at - side : at);
    const A right = number<V>(buffer, has_right ? at + columns * side : at);
    values[0] = has_left ? left : A(0);
    values[columns + 1] = has_right ? right : A(0);
  }

  // Calls body(row, column) for the pixels beside the block's columns, and beside these above and
  // below, shared out among the threads of a channel.
  template <class Body>
  __device__ void each_beside(const Body& body) const {
    if (plan.windows == 1 || !exists) return;
    const int from = max_of(first_row - 1, 0), to = min_of(last_row + 1, plan.height);
    const int first = static_cast<int>(threadIdx.x) / side % (plan.across * plan.down);
    for (int row = from + first; row < to; row += plan.across * plan.down) {
      if (first_column_ > 0) body(row, first_column_ - 1);
      if (last_column_ < plan.width) body(row, last_column_);
    }
  }

  // Puts out the thread's pixels of a row: into the map (channels_last, where threads side by side
  // fill a sector), or into a buffer that `flush` then writes to it.
  __device__ void put(int row, const A (&values)[columns], Shared<T> buffer, T* map) const {
    const int at = place(row, column);
    T* const to = map + (channels_last ? offset(row, column) : 0);
#pragma unroll
    for (int e = 0; e < columns; ++e) {
      if (e >= count) continue;
      T value;
      from_compute(values[e], value);
      if constexpr (channels_last)
        to[e * plan.channels] = value;
      else
        buffer[at + e] = value;
    }
  }

  // All threads of the block call it, after a barrier.
  __device__ void flush(Shared<T> buffer, T* map) const {
    if constexpr (channels_last) return;
    if (!plan.packs)
      return each_pixel(first_row, last_row, first_column_, last_column_,
                        [&](int plane, int row, int column) {
                          map[offset_of(plane, row, column)] = buffer[place_of(plane, row, column)];
                        });
    const Span span = span_of(first_row, last_row);
    T* const begin = map + span.start;
    each_pack(span, [&](int at) {
      const int end = at + kPack<T>;
      if (at >= span.first && end <= span.last)
        return store_pack(begin + at, shared_pack<T>(buffer + at));
#pragma unroll 1
      for (int i = max_of(at, span.first); i < min_of(end, span.last); ++i) begin[i] = buffer[i];
    });
  }

  // Adds up what the threads of a channel have summed, and calls write(i, piece, total) once for
  // each sum of each channel of the block. `exchange` has room for count * kTileThreads. All threads
  // of the block call it.
  template <int count, class Write>
  __device__ void finish(const A (&sums)[count], Shared<A> exchange, const Write& write) const {
    const int thread = static_cast<int>(threadIdx.x), room = plan.groups * side;
    const int threads = plan.across * plan.down;
#pragma unroll
    for (int i = 0; i < count; ++i) exchange[i * kTileThreads + thread] = sums[i];
    __syncthreads();
    int lanes = 1;  // that share a sum
    while (lanes < kWarp && 4 * lanes < threads) lanes *= 2;
#pragma unroll 1
    for (int first = 0; first < count * room; first += kTileThreads / lanes) {
      const int k = first + thread / lanes, own = k % room, i = k / room;
      A total = 0;
      if (i < count) {
        const int at = i * kTileThreads + own / side * threads * side + own % side;
        for (int t = thread % lanes; t < threads; t += lanes) total += exchange[at + t * side];
      }
      total = sum_lanes(total, lanes);
      if (i < count && own < planes_ && thread % lanes == 0) write(i, piece_of(own), total);
    }
  }

 private:
  __device__ static int min_of(int a, int b) { return a < b ? a : b; }
  __device__ static int max_of(int a, int b) { return a > b ? a : b; }

  template <class V>
  __device__ static A number(Shared<V> buffer, int at) {
    return to_compute(static_cast<V>(buffer[at]));
  }

  // Threads side by side have channels (channels_last), then columns, runs of rows, and planes.
  __device__ void take_share(int thread) {
    const int lane = thread % side, place = thread / side, across = place % plan.across;
    const int down = place / plan.across % plan.down, group = place / plan.across / plan.down;
    own_ = group * side + lane;
    exists = group < plan.groups && own_ < planes_;
    if (!exists) own_ = 0;  // it does nothing, and finds its factors somewhere
    column = first_column_ + across * columns;
    count = exists ? max_of(min_of(last_column_ - column, columns), 0) : 0;
    has_left = column > 0;
    has_right = column + columns < plan.width;
    const int rows = (last_row - first_row + plan.down - 1) / plan.down;
    begin = first_row + down * rows;
    end = count > 0 ? min_of(begin + rows, last_row) : begin;
    base_ = place_of(own_, 0, 0);
  }

  // Of a plane of the block.
  __device__ Size offset_of(int plane, int row, int column) const {
    const int pixel = row * plan.width + column;
    if constexpr (channels_last) return origin_ + pixel * plan.channels + plane;
    return origin_ + static_cast<Size>(plane) * plan.height * plan.width + pixel;
  }
  __device__ int place_of(int plane, int row, int column) const {
    const int pixel = (row - top_) * line_ + column - left_;
    return phase_ + (plane / side * pixels_ + pixel) * side + plane % side;
  }
  __device__ Size piece_of(int plane) const {
    if (!channels_last && plan.pieces() == 1) return first_ + plane;
    return piece - own_ + plane;  // NCHW: there is but one
  }

  // Calls body(plane, row, column) for the pixels of all channels of the block.
  template <class Body>
  __device__ void each_pixel(int from, int to, int left, int right, const Body& body) const {
    const int across = right - left, pixels = across * (to - from);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < pixels * planes_; i += kTileThreads) {
      const int plane = channels_last ? i % planes_ : i / pixels;
      const int pixel = channels_last ? i / planes_ : i % pixels;
      body(plane, from + pixel / across, left + pixel % across);
    }
  }

  // NCHW: rows of a buffer are its elements [first, last), and those from `start` on in memory.
  struct Span {
    Size start;
    int first, last;
  };
  __device__ Span span_of(int from, int to) const {
    const Size start = offset_of(0, top_, 0) - phase_;
    return {start, static_cast<int>(offset_of(0, from, 0) - start),
            static_cast<int>(offset_of(planes_ - 1, to, 0) - start)};
  }

  // Calls body(place) for the packs that hold any of them.
  template <class Body>
  __device__ void each_pack(const Span& span, const Body& body) const {
    const int own = static_cast<int>(threadIdx.x) * kPack<T>;
#pragma unroll 1  // copies are on their way together all the same
    for (int at = span.first / kPack<T> * kPack<T> + own; at < span.last;
         at += kTileThreads * kPack<T>)
      body(at);
  }

  // channels_last: a warp takes a line.
  __device__ void fetch_pixels(const T* map, Shared<T> buffer, int from, int to) const {
    constexpr int kAcross = side / kPack<T>, kAtOnce = kWarp / kAcross;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int first = left_ + lane / kAcross;
#pragma unroll 1
    for (int plane = lane % kAcross * kPack<T>; plane < planes_; plane += side)
#pragma unroll 1
      for (int row = from + thread / kWarp; row < to; row += kTileThreads / kWarp) {
        const T* pixel = map + offset_of(plane, row, first);
        int at = place_of(plane, row, first);
#pragma unroll 1
        for (int column = first; column < right_; column += kAtOnce) {
          copy_pack(pixel, buffer + at);
          pixel += kAtOnce * plan.channels;
          at += kAtOnce * side;
        }
      }
  }

  int first_column_, last_column_;            // of the block
  int top_, bottom_, left_, right_;           // where a buffer begins and ends
  int line_, pixels_;                         // of a buffer: pixels of a row, of a plane
  int planes_;                                // channels that the block has
  int own_;                                   // the thread's
  int base_;                                  // place of the first pixel of its plane
  int phase_ = 0;                             // of the first pixel in a buffer
  Size first_;                                // channel (channels_last) or plane
  Size origin_;                               // its offset
};

// to[e] += three taps of a filter on the pixels around column e.
template <class A>
__device__ inline void add_taps(const Row<A>& row, A left, A middle, A right,
                                A (&to)[kColumns<A>]) {
#pragma unroll
  for (int e = 0; e < kColumns<A>; ++e) {
    to[e] += left * row[e];
    to[e] += middle * row[e + 1];
    to[e] += right * row[e + 2];
  }
}

// What a 3x3 filter makes of rows that come one by one. A row reaches the results of the row above
// it, which are complete with it, its own and those of the row below: also where nobody wants them,
// as that costs less than to leave it out.
template <class A>
struct FilteredRows {
  A above[kColumns<A>] = {}, own[kColumns<A>] = {};

  // Before a row is added; `start`: what the row below begins with.
  __device__ void move_on(A start, A (&done)[kColumns<A>]) {
#pragma unroll
    for (int e = 0; e < kColumns<A>; ++e) {
      done[e] = above[e];
      above[e] = own[e];
      own[e] = start;
    }
  }
  __device__ void add(const Row<A>& values, const A (&filter)[9], A (&done)[kColumns<A>]) {
    add_taps(values, filter[6], filter[7], filter[8], done);
    add_taps(values, filter[3], filter[4], filter[5], above);
    add_taps(values, filter[0], filter[1], filter[2], own);
  }
};

// Rows that come one by one, as they are.
template <class A>
struct ThreeRows {
  Row<A> rows[3] = {};

  __device__ Row<A>& move_on() {
#pragma unroll
    for (int e = 0; e < kColumns<A> + 2; ++e) {
      rows[0][e] = rows[1][e];
      rows[1][e] = rows[2][e];
    }
    return rows[2];
  }
  // What reaches column e from gradients of what a filter made of a map: to += that, and the share of
  // the map's pixel in the gradient of the filter.
  __device__ void spread(int e, const A (&filter)[9], A pixel, bool counts, A& to,
                         A* of_filter) const {
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const A gradient = rows[i / 3][e + i % 3];
      to += filter[8 - i] * gradient;
      if (counts) of_filter[8 - i] += pixel * gradient;
    }
  }
};

}  // namespace dla::cuda
