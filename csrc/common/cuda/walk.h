// How the threads of a grid share out a dense feature map for kernels that look at the neighbours
// of a pixel. A thread has one channel; it walks down columns of it and keeps the 3x3 pixels around
// it. Threads side by side have what lies side by side in memory: columns (NCHW) or channels
// (channels_last). What three columns or three rows share comes from the L1 cache.
#pragma once

#include "common/cuda/map.h"

namespace dla::cuda {

struct Walk {
  Size batch, channels;
  int height, width;
  bool channels_last;
  int across = 0;    // threads side by side on the columns of a channel
  int together = 0;  // channels of a block
  int rows = 0;      // rows that a block takes
  Size groups = 0, strips = 0, blocks = 0;  // blocks along channels and rows; all together
};

// At most `rows` rows to a block; 0: all of them.
inline Walk walk_map(Size batch, Size channels, Size height, Size width, bool channels_last,
                     int rows) {
  Walk walk{batch, channels, static_cast<int>(height), static_cast<int>(width), channels_last};
  if (channels_last) {
    for (walk.together = 1; walk.together < kWarp && walk.together < channels;) walk.together *= 2;
    walk.across = kThreads / walk.together;
  } else {
    for (walk.across = 1; walk.across < kThreads && walk.across < width;) walk.across *= 2;
    walk.together = kThreads / walk.across;
  }
  walk.rows = rows == 0 ? walk.height : rows;
  walk.groups = ceil_div(channels, walk.together);
  walk.strips = ceil_div(height, walk.rows);
  walk.blocks = batch * walk.groups * walk.strips;
  return walk;
}

// What a thread does of it.
struct Path {
  Size sample, channel, plane;
  Size piece;                // place of the block's rows in an array [batch, strips, channels]
  bool exists;               // whether it has a channel
  int first_column;          // then every walk.across-th
  int first_row, last_row;
  Size origin, down, right;  // offset of the plane's first pixel; from pixel to pixel
  int height, width;         // height 0 without a channel: no pixel is then inside

  __device__ explicit Path(const Walk& walk) : width(walk.width) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool last = walk.channels_last;
    Size block = blockIdx.x;
    const Size strip = block % walk.strips;
    first_row = static_cast<int>(strip) * walk.rows;
    last_row = first_row + walk.rows < walk.height ? first_row + walk.rows : walk.height;
    block /= walk.strips;
    sample = block / walk.groups;
    channel = block % walk.groups * walk.together +
              (last ? thread % walk.together : thread / walk.across);
    first_column = last ? thread / walk.together : thread % walk.across;
    exists = channel < walk.channels;
    height = exists ? walk.height : 0;
    plane = sample * walk.channels + channel;
    piece = (sample * walk.strips + strip) * walk.channels + channel;
    const Size area = static_cast<Size>(walk.height) * width;
    origin = last ? sample * area * walk.channels + channel : plane * area;
    right = last ? walk.channels : 1;
    down = right * width;
  }

  __device__ Size offset(int row, int column) const {
    return origin + row * down + column * right;
  }
  __device__ bool inside(int row, int column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }
};

// The pixels around one of a map, zeros outside. `read` gives the pixel at an offset.
template <class A>
struct Window {
  A at[9];

  // Moves on by a row, whose pixels are these.
  __device__ void push(A left, A middle, A right) {
#pragma unroll
    for (int i = 0; i < 6; ++i) at[i] = at[i + 3];
    at[6] = left;
    at[7] = middle;
    at[8] = right;
  }

  // The same, of a map; without `sides` just its middle column is needed.
  template <class Read>
  __device__ void next(const Path& path, const Read& read, int row, int column,
                       bool sides = true) {
    const Size here = path.offset(row, column);
    const bool left = sides && path.inside(row, column - 1);
    const bool right = sides && path.inside(row, column + 1);
    push(left ? read(here - path.right) : A(0), path.inside(row, column) ? read(here) : A(0),
         right ? read(here + path.right) : A(0));
  }

  // Around (row, column), but for the last row: next(row + 1) completes it.
  template <class Read>
  __device__ void begin(const Path& path, const Read& read, int row, int column,
                        bool sides = true) {
    next(path, read, row - 1, column, sides);
    next(path, read, row, column, sides);
  }

  __device__ A centre() const { return at[4]; }
  __device__ A above() const { return at[1]; }

  __device__ A dot(const A (&filter)[9]) const {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < 9; ++i) sum += filter[i] * at[i];
    return sum;
  }

  // What reaches the pixel from the gradients around it, of what the filter made of the map.
  __device__ A transposed_dot(const A (&filter)[9]) const {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < 9; ++i) sum += filter[8 - i] * at[i];
    return sum;
  }
};

// Adds up what all threads of a block have summed for their channels, and calls write(totals) in
// one thread of each. All threads of the block call it, once.
template <class A, int count, class Write>
__device__ inline void finish_walk(const Walk& walk, const Path& path, const A (&sums)[count],
                                   const Write& write) {
  DLA_SHARED(A, of_warps, count * kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int step = walk.channels_last ? walk.together : 1;
  const int most = kWarp / step, lanes = walk.across < most ? walk.across : most;
  A totals[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    totals[i] = sum_lanes(sums[i], lanes, step);
    of_warps[i * kThreads + thread] = totals[i];
  }
  __syncthreads();
  if (path.first_column > 0 || !path.exists) return;
#pragma unroll
  for (int i = 0; i < count; ++i)
    for (int warp = 1; warp < walk.across / lanes; ++warp)
      totals[i] += of_warps[i * kThreads + thread + warp * kWarp];
  write(totals);
}

}  // namespace dla::cuda
