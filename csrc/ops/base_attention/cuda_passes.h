// The passes of base_attention over whole feature maps, with o = sum_t w_t v_t. They form o from x
// and the values of the earlier layers, in the compute type; the layer's own value is never read.
#pragma once

#include "common/cuda/attention_step.h"
#include "common/cuda/statistics.h"
#include "common/cuda/tile.h"

namespace dla::cuda::base {

constexpr int kMostTerms = 66;  // values of 63 layers; or g of as many, the layer's own, grad_v
constexpr int kTaps = 9;
constexpr int kTogether = 2;    // packs that a thread works on at once: registers allow no more
// Launch bounds name one block to a processor at least: left alone, ptxas aims at more of them,
// with fewer registers, and spills.

// Their elements.
template <class T>
using Elements = Compute<T>[kTogether][kPack<T>];

// A weighted sum of maps, whose addresses travel as arguments of the kernel.
template <class T>
struct Terms {
  int count = 0;
  const T* maps[kMostTerms];
  const Compute<T>* weights[kMostTerms];  // [B, C]; null: 1

  void add(const void* map, const Compute<T>* weight) {
    maps[count] = static_cast<const T*>(map);
    weights[count++] = weight;
  }
};

// What o is made of.
template <class T>
struct Mix {
  Terms<T> earlier;
  const T* x;
  const Compute<T>*v_weight, *own_weight;  // [C, 3, 3]; [B, C]
  int height, width;
};

// Packs first, first + stride, ... of a part.
template <class T>
struct Group {
  const Part<T>& part;
  Size first;
  int most = kTogether;

  __device__ Size number(int j) const { return first + j * part.stride; }
  __device__ bool exists(int j) const { return j < most && number(j) < part.count; }
  __device__ Place place(int j) const {
    return exists(j) ? part.place(number(j)) : Place{0, 0, 0, false};
  }
  __device__ static bool holds(const Place& place, int e) {
    return e >= place.begin && e < place.end;
  }
};

// Calls body(group) for all packs of the part.
template <class T, class Body>
__device__ inline void for_groups(const Part<T>& part, const Body& body) {
  for (Size i = part.first; i < part.count; i += kTogether * part.stride)
    body(Group<T>{part, i});
}

template <class T>
__device__ inline void load_elements(const T* map, const Group<T>& group, Elements<T>& values) {
  Pack<T> packs[kTogether];
#pragma unroll
  for (int j = 0; j < kTogether; ++j) packs[j] = load(map, group.place(j));
#pragma unroll
  for (int j = 0; j < kTogether; ++j)
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) values[j][e] = to_compute(packs[j].of[e]);
}

template <class T>
__device__ inline void store_elements(T* map, const Group<T>& group, const Elements<T>& values) {
#pragma unroll
  for (int j = 0; j < kTogether; ++j)
    if (group.exists(j)) store(map, group.place(j), values[j]);
}

// To and from a map of the compute type.
template <class T>
__device__ inline void store_unrounded(Compute<T>* map, const Place& place,
                                       const Compute<T> (&values)[kPack<T>]) {
  using A = Compute<T>;
#pragma unroll
  for (int first = 0; first < kPack<T>; first += kPack<A>) {
    Pack<A> pack;
#pragma unroll
    for (int e = 0; e < kPack<A>; ++e) pack.of[e] = values[first + e];
    if (place.whole) {
      store_pack(map + place.offset + first, pack);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kPack<A>; ++e)
      if (first + e >= place.begin && first + e < place.end)
        map[place.offset + first + e] = pack.of[e];
  }
}

template <class T>
__device__ inline void load_unrounded(const Compute<T>* map, const Place& place,
                                      Compute<T> (&values)[kPack<T>]) {
  using A = Compute<T>;
#pragma unroll
  for (int first = 0; first < kPack<T>; first += kPack<A>) {
    const Place part{place.offset + first, place.begin - first, place.end - first, place.whole};
    const Pack<A> pack = load(map, part);
#pragma unroll
    for (int e = 0; e < kPack<A>; ++e) values[first + e] = pack.of[e];
  }
}

// sum += the terms.
template <class T>
__device__ inline void add_terms(const Terms<T>& terms, const Group<T>& group, Elements<T>& sum) {
  using A = Compute<T>;
  for (int t = 0; t < terms.count; ++t) {
    A weights[kPack<T>];
    if (terms.weights[t] != nullptr) {
      load_factors(group.part, terms.weights[t], weights);
    } else {
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) weights[e] = A(1);
    }
    Elements<T> values;
    load_elements(terms.maps[t], group, values);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) sum[j][e] += weights[e] * values[j][e];
  }
}

// ---- the layer's own value ----------------------------------------------------------------------

// v = DW(x), unrounded. The filters lie in shared memory: in channels_last every element of a pack
// has its own.
template <class T>
class OwnValue {
  using A = Compute<T>;

  __device__ static Shared<A> shared_filters() {
    DLA_SHARED(A, filters, kTaps * kThreads);
    return filters;
  }

 public:
  // All threads of the block make one.
  __device__ OwnValue(const Mix<T>& mix, const Cut& cut, const Part<T>& part)
      : mix_(mix), rows_(cut.rows), filter_(shared_filters()) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % cut.lanes, group = thread / cut.lanes;
    filter_ = filter_ + (rows_ ? lane * kPack<T> : group) * kTaps;
    const int first = rows_ ? group : lane, stride = rows_ ? kThreads / cut.lanes : cut.lanes;
    const A* from = mix.v_weight + part.plane % cut.channels * kTaps;
    for (int i = first; i < kTaps * part.width; i += stride) filter_[i] = from[i];
    __syncthreads();
  }

  __device__ void form(const Group<T>& group, Elements<T>& own) const {
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) own[j][e] = A(0);
    if (rows_) {
      form_pixels(group, own);
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (group.exists(j)) form_along(group.part, group.place(j), own[j]);
    }
  }

 private:
  // channels_last: of the channels of a pack, pixel by pixel.
  __device__ void form_pixels(const Group<T>& group, Elements<T>& own) const {
    int row[kTogether], column[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      row[j] = static_cast<int>(group.number(j)) / mix_.width;
      column[j] = static_cast<int>(group.number(j)) % mix_.width;
    }
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int down = tap / 3 - 1, right = tap % 3 - 1;
      A filter[kPack<T>];
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e)
        filter[e] = e < group.part.width ? static_cast<A>(filter_[e * kTaps + tap]) : A(0);
      Pack<T> packs[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const bool inside = group.exists(j) && within(row[j] + down, mix_.height) &&
                            within(column[j] + right, mix_.width);
        const Size pixel = group.number(j) + down * mix_.width + right;
        packs[j] = load(mix_.x, inside ? group.part.place(pixel) : Place{0, 0, 0, false});
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e) own[j][e] += filter[e] * to_compute(packs[j].of[e]);
    }
  }

  // NCHW: of a pack of neighbouring pixels of one plane, in which lines follow each other. The
  // pixel before the first of a line is the last of another one, hence the masks.
  __device__ void form_along(const Part<T>& part, const Place& place, A (&own)[kPack<T>]) const {
    const int width = mix_.width;
    const int pixel = static_cast<int>(place.offset - part.low);  // may lie before the plane
    int column = (pixel % width + width) % width;
    unsigned first = 0, last = 0;
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      if (column == 0) first |= 1u << e;
      if (column == width - 1) last |= 1u << e;
      column = column == width - 1 ? 0 : column + 1;
    }
#pragma unroll 1
    for (int line = 0; line < 3; ++line) {
      const A left = filter_[3 * line], middle = filter_[3 * line + 1];
      const A right = filter_[3 * line + 2];
      const Size offset = place.offset + (line - 1) * width;
      const Pack<T> pack = load(mix_.x, part.clip(offset, part.high));
      A x[kPack<T> + 2];
      x[0] = one_pixel(part, offset - 1);
      x[kPack<T> + 1] = one_pixel(part, offset + kPack<T>);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) x[e + 1] = to_compute(pack.of[e]);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        own[e] += middle * x[e + 1];
        if ((first >> e & 1) == 0) own[e] += left * x[e];
        if ((last >> e & 1) == 0) own[e] += right * x[e + 2];
      }
    }
  }

  __device__ A one_pixel(const Part<T>& part, Size offset) const {
    return offset >= part.low && offset < part.high ? to_compute(mix_.x[offset]) : A(0);
  }
  __device__ static bool within(int i, int size) { return i >= 0 && i < size; }

  const Mix<T>& mix_;
  const bool rows_;
  Shared<A> filter_;
};

// o and the own value.
template <class T>
__device__ inline void form_mix(const Mix<T>& mix, const OwnValue<T>& value, const Group<T>& group,
                                Elements<T>& o, Elements<T>& own) {
  value.form(group, own);
  Compute<T> weights[kPack<T>];
  load_factors(group.part, mix.own_weight, weights);
#pragma unroll
  for (int j = 0; j < kTogether; ++j)
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) o[j][e] = weights[e] * own[j][e];
  add_terms(mix.earlier, group, o);
}

// ---- the branch behind o ------------------------------------------------------------------------

// Of the elements of a thread's packs: m [relu](norm(o)). Backward passes find the same numbers: the
// gradient goes where this is positive.
template <class T>
struct PackBranch {
  using A = Compute<T>;
  const PackNorm<T> norm;
  const A drop;
  const bool relu;

  __device__ PackBranch(const OutputNorm<A>& end, const Cut& cut, const Part<T>& part)
      : norm(end.norm, cut, part),
        drop(part.width > 0 ? end.drop(part.plane / cut.channels) : A(1)),
        relu(end.relu) {}

  __device__ A centred(A o, int e) const { return o - norm.centre[e]; }
  __device__ A forward(A o, int e) const {
    const A z = norm(o, e);
    return drop * (relu && z < A(0) ? A(0) : z);  // NaN stays
  }
  // Gradient of the normed o from that of out.
  __device__ A backward(A o, A grad, int e) const {
    return relu && norm(o, e) <= A(0) ? A(0) : drop * grad;
  }
};

// ---- forward ------------------------------------------------------------------------------------

// v, unless it is null; per piece the sums of x and of v.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    value_kernel(Cut cut, const __grid_constant__ Mix<T> mix, T* v, Compute<T>* sums_x,
                 Compute<T>* sums_v) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const OwnValue<T> value(mix, cut, part);
  Values<T, 2> sums = {};
  for_groups(part, [&](const Group<T>& group) {
    Elements<T> x, own;
    load_elements(mix.x, group, x);
    value.form(group, own);
    if (v != nullptr) store_elements(v, group, own);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const Place place = group.place(j);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        sums[0][e] += x[j][e];
        sums[1][e] += group.holds(place, e) ? own[j][e] : A(0);
      }
    }
  });
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    sums_x[piece_of(cut, plane)] = totals[0];
    sums_v[piece_of(cut, plane)] = totals[1];
  });
}

// o, unless it is null; mean and centred sum of squares of every piece of it. The sums are about o
// at the plane's first pixel: about 0 they would lose the digits that a large mean takes.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    mix_moments_kernel(Cut cut, const __grid_constant__ Mix<T> mix, Compute<T>* kept_o,
                       Compute<T>* means, Compute<T>* squares) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const OwnValue<T> value(mix, cut, part);
  A start[kPack<T>] = {};
  Values<T, 2> sums = {};
  // Before its own packs a thread forms the plane's first.
  const Size step = kTogether * part.stride, before = part.first - step;
  for (Size i = before; i < part.count; i += step) {
    const Group<T> group{part, i == before ? 0 : i, i == before ? 1 : kTogether};
    Elements<T> o, own;
    form_mix(mix, value, group, o, own);
    if (i == before) {
      A found = 0;
      const int begin = group.place(0).begin;
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) found = e == begin ? o[0][e] : found;
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) start[e] = cut.rows ? o[0][e] : found;
      continue;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const Place place = group.place(j);
      if (kept_o != nullptr) store_unrounded<T>(kept_o, place, o[j]);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        const A centred = group.holds(place, e) ? o[j][e] - start[e] : A(0);
        sums[0][e] += centred;
        sums[1][e] += centred * centred;
      }
    }
  }
  // The thread that finishes a plane's sums has the plane's start, too.
  if (threadIdx.x % static_cast<unsigned>(cut.rows ? kThreads : cut.lanes) <
      (cut.rows ? kRowLanes : 1u))
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e)
      if (e < part.width) means[piece_of(cut, part.plane_of(e))] = start[e];
  const A pixels =
      static_cast<A>(pixels_of_piece(cut, blockIdx.x % static_cast<unsigned>(cut.chunks)));
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    const A mean = totals[0] / pixels, square = totals[1] - totals[0] * mean;
    means[piece_of(cut, plane)] += mean;
    squares[piece_of(cut, plane)] = square < A(0) ? A(0) : square;
  });
}

// out = [x +] the branch. kept_o may be null.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    output_kernel(Cut cut, const __grid_constant__ Mix<T> mix, const Compute<T>* kept_o,
                  OutputNorm<Compute<T>> norm, bool residual, T* out) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const OwnValue<T> value(mix, cut, part);
  const PackBranch<T> end(norm, cut, part);
  for_groups(part, [&](const Group<T>& group) {
    Elements<T> o, other;
    if (kept_o == nullptr) {
      form_mix(mix, value, group, o, other);
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) load_unrounded<T>(kept_o, group.place(j), o[j]);
    }
    load_elements(mix.x, group, other);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e)
        o[j][e] = (residual ? other[j][e] : A(0)) + end.forward(o[j][e], e);
    store_elements(out, group, o);
  });
}

// ---- backward -----------------------------------------------------------------------------------

// Per piece the sums of G', alone and with o - mean; G' is the gradient of the normed o.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    norm_sums_kernel(Cut cut, const __grid_constant__ Mix<T> mix, OutputNorm<Compute<T>> norm,
                     const T* grad, Compute<T>* alone, Compute<T>* with_o) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const OwnValue<T> value(mix, cut, part);
  const PackBranch<T> end(norm, cut, part);
  Values<T, 2> sums = {};
  for_groups(part, [&](const Group<T>& group) {
    Elements<T> o, other;
    form_mix(mix, value, group, o, other);
    load_elements(grad, group, other);
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        const A passed = end.backward(o[j][e], other[j][e], e);
        sums[0][e] += passed;
        sums[1][e] += passed * end.centred(o[j][e], e);
      }
  });
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    alone[piece_of(cut, plane)] = totals[0];
    with_o[piece_of(cut, plane)] = totals[1];
  });
}

// Every thread gets one group of packs, and a plane of NCHW no more than a warp.
template <class T>
Cut cut_groups(Size batch, Size channels, Size area, bool channels_last,
               std::initializer_list<const void*> maps) {
  Cut cut = cut_map<T>(batch, channels, area, channels_last, true, maps);
  if (channels_last) {
    cut.blocks /= cut.chunks;
    cut.chunk = kThreads / kRowLanes * kTogether;
    cut.chunks = ceil_div(area, cut.chunk);
    cut.blocks *= cut.chunks;
  } else {
    const Size packs = cut.chunk;
    cut.lanes = cut.lanes < kWarp ? cut.lanes : kWarp;
    cut.chunk = cut.lanes * kTogether;
    cut.chunks = ceil_div(packs, cut.chunk);
    cut.blocks = ceil_div(cut.planes, kThreads / cut.lanes) * cut.chunks;
  }
  return cut;
}

// The sum of one * other over the pieces of a block, cut by cut_groups, to `sums`. All threads of
// the block call it, with `turn` 0 and 1 by turns: two barriers a call would cost more.
template <class T>
__device__ inline void put_products(const Cut& cut, const Part<T>& part, const Elements<T>& one,
                                    const Elements<T>& other, int turn, Compute<T>* sums) {
  using A = Compute<T>;
  constexpr int kWarps = kThreads / kWarp, kRow = kRowLanes * kPack<T>;
  DLA_SHARED(A, of_warps, 2 * kWarps * kRow);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  A products[kPack<T>] = {}, total = 0;
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) products[e] += one[j][e] * other[j][e];
    total += products[e];
  }
  if (!cut.rows) {
    total = sum_lanes(total, cut.lanes);
    if (thread % cut.lanes == 0 && part.width > 0) sums[piece_of(cut, part.plane)] = total;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) {
    const A sum = sum_lanes(products[e], kWarp / kRowLanes, kRowLanes);
    if (lane < kRowLanes) of_warps[(turn * kWarps + warp) * kRow + lane * kPack<T> + e] = sum;
  }
  __syncthreads();
  // One element of the row of channels to a thread.
  const Size tile = blockIdx.x / static_cast<unsigned>(cut.chunks);
  const Size channel = tile % cut.tiles * kRow + thread;
  if (thread >= kRow || channel >= cut.channels) return;
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warps[(turn * kWarps + w) * kRow + thread];
  sums[piece_of(cut, tile / cut.tiles * cut.channels + channel)] = total;
}

// g = scale G' + of_o (o - mean) + added; per piece the sums of its products with the values, the
// own one's last, [count + 1, pieces].
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    mix_gradients_kernel(Cut cut, const __grid_constant__ Mix<T> mix, OutputNorm<Compute<T>> norm,
                         const T* grad, const Compute<T>* of_o, const Compute<T>* added, T* g,
                         Compute<T>* products) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const OwnValue<T> value(mix, cut, part);
  const Group<T> group{part, part.first};
  Elements<T> o, other;
  form_mix(mix, value, group, o, other);
  const Size pieces = cut.planes * cut.chunks;
  {
    const PackBranch<T> end(norm, cut, part);
    A slope[kPack<T>], offset[kPack<T>];
    make_factors(cut, part, slope, [&](Size c) { return value_or_zero(of_o, c); });
    make_factors(cut, part, offset, [&](Size c) { return value_or_zero(added, c); });
    Elements<T> given;
    load_elements(grad, group, given);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const Place place = group.place(j);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) {
        const A passed = end.norm.factor[e] * end.backward(o[j][e], given[j][e], e);
        const A found = passed + (slope[e] * end.centred(o[j][e], e) + offset[e]);
        o[j][e] = group.holds(place, e) ? found : A(0);
      }
    }
    store_elements(g, group, o);
  }
  const int earlier = mix.earlier.count;
  put_products(cut, part, o, other, 1, products + earlier * pieces);
  for (int t = 0; t < earlier; ++t) {
    load_elements(mix.earlier.maps[t], group, other);
    put_products(cut, part, o, other, t % 2, products + t * pieces);
  }
}

// out = the sum of the terms.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Cut cut, const __grid_constant__ Terms<T> terms, T* out) {
  const Part<T> part(cut, blockIdx.x);
  for_groups(part, [&](const Group<T>& group) {
    Elements<T> sum = {};
    add_terms(terms, group, sum);
    store_elements(out, group, sum);
  });
}

// What arrives at a value, and what its gradient adds to.
template <class T>
struct ValueGradient {
  const T *dv, *x, *shortcut;                 // dv and shortcut may be null
  const Compute<T>*weight, *v_weight;         // of dv [B, C], null: 1; [C, 3, 3]
  const Compute<T>*dmean_v, *dmean_x;         // [B, C]; dmean_v may be null
};

// dx = [shortcut +] DW^T(dv) + dmean_x / area, of dv with its share of dmean_v; per piece the sums
// of dv times the nine pixels of x that v is made of, [9, B, pieces, C].
template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads, 4)
    value_gradients_kernel(const __grid_constant__ Tiling plan, ValueGradient<T> in, T* dx,
                           Compute<T>* sums) {
  using A = Compute<T>;
  DLA_SHARED(A, exchange, kTaps * kTileThreads);
  DLA_DYNAMIC_SHARED(T, x);
  const Tile<T, channels_last> tile(plan);
  const bool has_dv = in.dv != nullptr, has_shortcut = in.shortcut != nullptr;
  const Shared<T> dv = x + plan.buffer, shortcut = x + (has_dv ? 2 : 1) * plan.buffer;
  tile.fetch(in.x, x, 0);
  if (has_dv) tile.fetch(in.dv, dv, 1);
  if (has_dv) tile.clear(dv);
  if (has_shortcut) tile.fetch(in.shortcut, shortcut, 0);
  const A area = static_cast<A>(static_cast<Size>(plan.height) * plan.width);
  const A level_x = in.dmean_x[tile.plane] / area;
  const A level_v = in.dmean_v == nullptr ? A(0) : in.dmean_v[tile.plane] / area;
  const A weight = in.weight == nullptr ? A(1) : in.weight[tile.plane];
  A filter[kTaps], products[kTaps] = {};
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) filter[tap] = in.v_weight[tile.channel * kTaps + tap];
  wait_for_packs();
  __syncthreads();
  ThreeRows<A> around;
  for (int row = tile.begin - 1; row <= tile.end && tile.begin < tile.end; ++row) {
    Row<A>& below = around.move_on();
    if (has_dv) tile.read(dv, row, below);
    const bool inside = tile.has_row(row);
#pragma unroll
    for (int e = 0; e < kColumns<A> + 2; ++e) {
      const A level = inside && tile.has(e) ? level_v : A(0);
      below[e] = has_dv ? weight * below[e] + level : level;
    }
    if (row <= tile.begin) continue;
    Row<A> own, passed = {};
    tile.read(x, row - 1, own, false);
    if (has_shortcut) tile.read(shortcut, row - 1, passed, false);
    A found[kColumns<A>];
#pragma unroll
    for (int e = 0; e < kColumns<A>; ++e) {
      found[e] = passed[e + 1] + level_x;
      around.spread(e, filter, own[e + 1], e < tile.count, found[e], products);
    }
    tile.put(row - 1, found, x, dx);  // nobody else reads these pixels of x
  }
  const Size size = plan.batch * plan.pieces() * plan.channels;
  tile.template finish<kTaps>(products, exchange, [&](int tap, Size piece, A total) {
    sums[tap * size + piece] = total;
  });
  tile.flush(x, dx);
}

}  // namespace dla::cuda::base
