// How the threads of a grid share out a dense feature map, for kernels that pass over it once. They
// are written without regard to its memory format: a thread walks over packs of 16 bytes, and holds
// one factor and one sum for each element of a pack.
//   NCHW           a group of threads (a part of a warp, a warp or a block) walks along a plane;
//                  the elements of all its packs belong to that plane;
//   channels_last  kRowLanes threads side by side take as many packs of channels, and walk down the
//                  pixels; an element of a pack always belongs to the same channel.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/cuda/launch.h"

namespace dla::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kRowLanes = 8;   // 128 bytes, a line of the cache
constexpr int kInFlight = 4;   // packs that a thread asks for before it uses the first

// A map and its division among blocks.
struct Cut {
  Size planes, channels, area;  // planes: of all samples
  bool rows;                    // channels_last
  bool aligned;                 // packs lie at multiples of 16 bytes
  bool whole;                   // and hold nothing of another plane (NCHW) or pixel
  int lanes = 0;                // threads side by side: on a plane, or across a row of channels
  Size chunk = 0, chunks = 0;   // packs of a plane (rows: pixels) that a block takes; such blocks
  Size tiles = 1;               // rows: blocks side by side across the channels
  Size blocks = 0;              // all together
};

// ---- host ---------------------------------------------------------------------------------------

DLA_HOST_DEVICE constexpr Size ceil_div(Size a, Size b) { return (a + b - 1) / b; }

inline bool aligned_to_packs(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  });
}

// Threads on a plane. Few for a small one: several planes then share a warp. All of a block for one
// that keeps them busy.
inline int lanes_for(Size packs) {
  if (packs > 16 * kWarp) return kThreads;
  int lanes = 1;
  while (lanes < packs && lanes < kWarp) lanes *= 2;
  return lanes;
}

// `maps` are the maps of this shape that the kernel reads and writes. A kernel that sums over
// planes leaves each to one block, others cut long ones.
template <class T>
Cut cut_map(Size batch, Size channels, Size area, bool channels_last, bool sums,
            std::initializer_list<const void*> maps) {
  const bool aligned = aligned_to_packs(maps);
  const bool whole = aligned && (channels_last ? channels : area) % kPack<T> == 0;
  Cut cut{batch * channels, channels, area, channels_last, aligned, whole};
  if (channels_last) {
    cut.lanes = kRowLanes;
    cut.chunk = sums ? area : kThreads / kRowLanes * kInFlight;
    cut.chunks = ceil_div(area, cut.chunk);
    cut.tiles = ceil_div(channels, kRowLanes * kPack<T>);
    cut.blocks = batch * cut.tiles * cut.chunks;
  } else {
    // A plane that does not fit whole packs may share its first and its last with its neighbours.
    const Size packs = whole ? area / kPack<T> : (area + kPack<T> - 2) / kPack<T> + 1;
    cut.lanes = lanes_for(packs);
    cut.chunk = sums || cut.lanes < kThreads ? packs : 2 * kInFlight * kThreads;
    cut.chunks = ceil_div(packs, cut.chunk);
    cut.blocks = ceil_div(cut.planes, kThreads / cut.lanes) * cut.chunks;
  }
  return cut;
}

// For sums over more than a plane: in channels_last up to `pieces` blocks share the pixels of a
// sample. The sums are those of pieces; `add_rows` adds them up.
template <class T>
Cut cut_pieces(Size batch, Size channels, Size area, bool channels_last, Size pieces,
               std::initializer_list<const void*> maps) {
  Cut cut = cut_map<T>(batch, channels, area, channels_last, true, maps);
  if (!channels_last) return cut;
  cut.chunk = ceil_div(area, pieces);
  cut.chunks = ceil_div(area, cut.chunk);
  cut.blocks *= cut.chunks;
  return cut;
}

// ---- device: who does what ----------------------------------------------------------------------

// Elements [begin, end) of the pack at `offset` are those meant.
struct Place {
  Size offset;
  int begin, end;
  bool whole;  // all of them, to be read and written at once
};

// The packs of one thread: `first`, `first + stride`, ... of a column of `count`.
template <class T>
struct Part {
  Size plane;  // of the first element of its packs
  int width;   // how many planes these are of: 1 (NCHW), or the channels of a pack; at most 0: none
  bool aligned, whole;
  Size origin, step;          // offset of pack 0; from pack to pack
  Size low, high, high_step;  // pack i holds elements from `low` to `high + i * high_step`
  Size first, count;
  int stride;

  __device__ Part(const Cut& cut, unsigned block) : aligned(cut.aligned), whole(cut.whole) {
    const Size chunk = block % static_cast<unsigned>(cut.chunks);
    block /= static_cast<unsigned>(cut.chunks);
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % cut.lanes, group = thread / cut.lanes;
    const int groups = kThreads / cut.lanes;
    if (cut.rows) {
      const Size tile = block % static_cast<unsigned>(cut.tiles);
      const Size sample = block / static_cast<unsigned>(cut.tiles);
      take_rows(cut, sample, (tile * kRowLanes + lane) * kPack<T>);
      first = chunk * cut.chunk + group;
      stride = groups;
    } else {
      take_plane(cut, static_cast<Size>(block) * groups + group);
      first = chunk * cut.chunk + lane;
      stride = cut.lanes;
    }
    if (width <= 0) count = 0;
    if (count > (chunk + 1) * cut.chunk) count = (chunk + 1) * cut.chunk;
  }

  __device__ Place place(Size i) const {
    const Size offset = origin + i * step;
    if (whole) return {offset, 0, kPack<T>, true};
    return clip(offset, high + i * high_step);
  }

  // The pack at an offset, without what lies before `low` or from `end` on.
  __device__ Place clip(Size offset, Size end) const {
    const Size before = low - offset, inside = end - offset;
    const int first = before > 0 ? static_cast<int>(before) : 0;
    const int last = inside < kPack<T> ? static_cast<int>(inside) : kPack<T>;
    return {offset, first, last, aligned && offset % kPack<T> == 0 && last - first == kPack<T>};
  }

  // The plane of element e of its packs.
  __device__ Size plane_of(int e) const { return plane + (e < width ? e : 0); }

  // Offset of the first element of that plane.
  __device__ Size start_of(int e) const {
    return high_step == 0 ? low : origin + (e < width ? e : 0);
  }

 private:
  __device__ void take_rows(const Cut& cut, Size sample, Size channel) {
    const Size left = cut.channels - channel;
    width = left < kPack<T> ? static_cast<int>(left) : kPack<T>;
    plane = sample * cut.channels + channel;
    origin = sample * cut.area * cut.channels + channel;
    step = high_step = cut.channels;
    low = 0;
    high = origin + width;
    count = cut.area;
  }

  __device__ void take_plane(const Cut& cut, Size number) {
    plane = number;
    width = number < cut.planes ? 1 : 0;
    low = number * cut.area;
    high = low + cut.area;
    high_step = 0;
    step = kPack<T>;
    origin = low - low % kPack<T>;
    count = (high - origin + kPack<T> - 1) / kPack<T>;
  }
};

// ---- device: what is done with a pack -----------------------------------------------------------

template <class T>
__device__ inline Pack<T> load(const T* map, const Place& place) {
  if (place.whole) return load_pack(map + place.offset);
  Pack<T> pack = {};
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    if (e >= place.begin && e < place.end) pack.of[e] = map[place.offset + e];
  return pack;
}

template <class T>
__device__ inline void store(T* map, const Place& place, const Compute<T> (&values)[kPack<T>]) {
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) from_compute(values[e], pack.of[e]);
  if (place.whole) return store_pack(map + place.offset, pack);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    if (e >= place.begin && e < place.end) map[place.offset + e] = pack.of[e];
}

// values[m][e]: elements of the packs of several maps at one place, 0 where there are none.
template <class T, int maps>
using Values = Compute<T>[maps][kPack<T>];

template <class T, int maps, class Body>
__device__ inline void call_with(const Body& body, const Place& place,
                                 const Pack<T> (&packs)[maps]) {
  Values<T, maps> values;
#pragma unroll
  for (int m = 0; m < maps; ++m)
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) values[m][e] = to_compute(packs[m].of[e]);
  body(place, values);
}

// Calls body(place, values) for all packs of the part. If they are whole, several are under way at
// any time; else there are but one or two to a thread, or the map lies as no allocator puts it.
template <class T, int count, class Body>
__device__ inline void for_packs(const Part<T>& part, const T* const (&maps)[count],
                                 const Body& body) {
  const int stride = part.stride;
  if (!part.whole) {
    for (Size i = part.first; i < part.count; i += stride) {
      const Place place = part.place(i);
      Pack<T> packs[count];
#pragma unroll
      for (int m = 0; m < count; ++m) packs[m] = load(maps[m], place);
      call_with<T>(body, place, packs);
    }
    return;
  }
  for (Size i = part.first; i < part.count; i += kInFlight * stride) {
    Pack<T> packs[kInFlight][count];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (i + j * stride < part.count)
#pragma unroll
        for (int m = 0; m < count; ++m)
          packs[j][m] = load_pack(maps[m] + part.origin + (i + j * stride) * part.step);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (i + j * stride < part.count) {
        const Place place{part.origin + (i + j * stride) * part.step, 0, kPack<T>, true};
        call_with<T>(body, place, packs[j]);
      }
  }
}

// Calls body(place) for all packs of the part.
template <class T, class Body>
__device__ inline void for_places(const Part<T>& part, const Body& body) {
  for (Size i = part.first; i < part.count; i += part.stride) body(part.place(i));
}

// factors[e]: the value of the plane of element e, of one value per plane.
template <class T>
__device__ inline void load_factors(const Part<T>& part, const Compute<T>* values,
                                    Compute<T> (&factors)[kPack<T>]) {
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    factors[e] = part.width > 0 ? values[part.plane_of(e)] : Compute<T>(0);
}

// The same of what value(channel) says.
template <class T, class Value>
__device__ inline void make_factors(const Cut& cut, const Part<T>& part,
                                    Compute<T> (&factors)[kPack<T>], const Value& value) {
  const Size channel = part.plane % cut.channels;
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    factors[e] = part.width > 0 ? value(channel + part.plane_of(e) - part.plane) : Compute<T>(0);
}

// Of an array that need not be there.
template <class A>
__device__ inline A value_or_zero(const A* values, Size i) {
  return values == nullptr ? A(0) : values[i];
}

// ---- device: sums -------------------------------------------------------------------------------

// Adds up what all threads of a block have summed, element by element of their packs, and calls
// write(plane, totals) once for every plane that is theirs. All threads of the block call it, once.
template <class T, int count, class Write>
__device__ inline void finish_sums(const Cut& cut, const Part<T>& part,
                                   const Values<T, count>& sums, const Write& write) {
  using A = Compute<T>;
  constexpr int kWarps = kThreads / kWarp, kRow = kRowLanes * kPack<T>;
  DLA_SHARED(A, of_warps, count * kWarps * kRow);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  A totals[count] = {};
  if (cut.rows) {
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        const A sum = sum_lanes(sums[i][e], kWarp / kRowLanes, kRowLanes);
        if (lane < kRowLanes) of_warps[(i * kWarps + warp) * kRow + lane * kPack<T> + e] = sum;
      }
    __syncthreads();
    if (thread >= kRowLanes) return;
    for (int e = 0; e < part.width; ++e) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        totals[i] = 0;
        for (int w = 0; w < kWarps; ++w)
          totals[i] += of_warps[(i * kWarps + w) * kRow + thread * kPack<T> + e];
      }
      write(part.plane + e, totals);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) totals[i] += sums[i][e];
      totals[i] = sum_lanes(totals[i], cut.lanes < kWarp ? cut.lanes : kWarp);
      if (cut.lanes > kWarp && lane == 0) of_warps[i * kWarps + warp] = totals[i];
    }
    if (cut.lanes > kWarp) {
      __syncthreads();
      if (thread > 0) return;
#pragma unroll
      for (int i = 0; i < count; ++i)
        for (int w = 1; w < kWarps; ++w) totals[i] += of_warps[i * kWarps + w];
    }
    if (thread % cut.lanes == 0 && part.width > 0) write(part.plane, totals);
  }
}

template <class T, class Write>
__device__ inline void finish_sums(const Cut& cut, const Part<T>& part,
                                   const Compute<T> (&sums)[kPack<T>], const Write& write) {
  Values<T, 1> one;
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) one[0][e] = sums[e];
  finish_sums<T, 1>(cut, part, one, [&](Size plane, const Compute<T>(&totals)[1]) {
    write(plane, totals[0]);
  });
}

// Numbers of pieces of planes lie as [sample and piece][channels]; here the block puts one.
__device__ inline Size piece_of(const Cut& cut, Size plane) {
  const Size piece = blockIdx.x % static_cast<unsigned>(cut.chunks);
  return (plane / cut.channels * cut.chunks + piece) * cut.channels + plane % cut.channels;
}

__device__ inline Size pixels_of_piece(const Cut& cut, Size piece) {
  if (!cut.rows) return cut.area;
  const Size left = cut.area - piece * cut.chunk;
  return left < cut.chunk ? left : cut.chunk;
}

// ---- device: sums over the batch ----------------------------------------------------------------

// Of kernels that add up the rows of arrays [rows, channels], in double: a block takes kRowLanes
// channels, and a thread one of them. Several such arrays, fields, have their blocks in turn.
inline Grid channel_grid(Size channels, Size fields = 1) {
  return {fields * ceil_div(channels, kRowLanes), kThreads};
}

__device__ inline Size field_of_block(Size channels) {
  return blockIdx.x / ceil_div(channels, kRowLanes);
}

// The thread's channel; `channels` or more: none.
__device__ inline Size own_channel(Size channels) {
  return blockIdx.x % ceil_div(channels, kRowLanes) * kRowLanes + threadIdx.x % kRowLanes;
}

// Whether the thread is the one to write what is found for its channel.
__device__ inline bool writes_channel(Size channels) {
  return threadIdx.x < kRowLanes && own_channel(channels) < channels;
}

// The sum of value(row, index) over all rows; index is where the thread's channel lies in the row.
// All threads of the block call it, and those of a channel get the same.
template <class Value>
__device__ inline double add_rows(Size rows, Size channels, const Value& value) {
  constexpr int kWarps = kThreads / kWarp, kGroups = kThreads / kRowLanes;
  DLA_SHARED(double, of_warps, kWarps * kRowLanes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Size channel = own_channel(channels);
  double sum = 0;
  for (Size row = thread / kRowLanes; row < rows && channel < channels; row += kGroups)
    sum += value(row, row * channels + channel);
  sum = sum_lanes(sum, kWarp / kRowLanes, kRowLanes);
  if (lane < kRowLanes) of_warps[warp * kRowLanes + lane] = sum;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warps[w * kRowLanes + thread % kRowLanes];
  __syncthreads();  // it may be called again
  return total;
}

// Rows of an array that has one for every piece of a sample.
DLA_HOST_DEVICE inline Size piece_rows(const Cut& cut) {
  return cut.planes / cut.channels * cut.chunks;
}

}  // namespace dla::cuda
