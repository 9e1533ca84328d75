// The passes of light_attention over whole feature maps on GPUs; passes.h says what they are for.
// A block takes some rows of a few channels (tile.h), and leaves sums of that. o and g = dL/do are
// made where they are needed, never stored unless asked for.
#pragma once

#include "common/cuda/attention_step.h"
#include "common/cuda/tile.h"
#include "ops/light_attention/plane_sums.h"

namespace dla::cuda::light {

// The x of a step: a map, or with `join` ReLU(norm(map) + p), formed wherever it is read.
template <class T>
struct Features {
  using A = Compute<T>;
  const T *x, *p;  // p may be null
  bool join;
  ChannelNorm<A> norm;  // of the branch
};

// o = a u + lam (d p + e), u = DW_v(x), e = DW_prev(p).
template <class A>
struct Mixture {
  const A *v_weight, *prev_weight;  // [channels, 3, 3]; prev_weight may be null
  const A *a, *d, *lam;             // [batch, channels], lam [channels]
};

// Gradients of out and of o; null where none arrives.
template <class T>
struct Arriving {
  const T *out, *o;
};

template <class A>
__device__ inline void load_filter(const A* weight, Size channel, A (&filter)[9]) {
#pragma unroll
  for (int i = 0; i < 9; ++i) filter[i] = weight == nullptr ? A(0) : weight[channel * 9 + i];
}

// Of one plane: o is the sum of both maps, filtered.
template <class A>
struct Filters {
  A a, x[9], p[9];

  template <class Tile>
  __device__ Filters(const Mixture<A>& mixture, const Tile& tile) : a(mixture.a[tile.plane]) {
    load_filter(mixture.v_weight, tile.channel, x);
    load_filter(mixture.prev_weight, tile.channel, p);
    const A lam = mixture.lam[tile.channel];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      x[i] *= a;
      p[i] *= lam;
    }
    p[4] += lam * mixture.d[tile.plane];
  }
  __device__ void scale(A factor) {
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      x[i] *= factor;
      p[i] *= factor;
    }
  }
};

// The maps x and p of a block, in shared memory.
template <class T, bool channels_last>
struct Maps {
  using A = Compute<T>;
  using Buffer = Shared<T>;
  const Tile<T, channels_last>& tile;
  const bool join, has_p, has_prev;
  Buffer x, p;
  const A mean, scale, bias;  // of the branch's norm

  // Puts them on their way. The first free buffer is then `next`.
  __device__ Maps(const Features<T>& in, const Tile<T, channels_last>& tile, bool has_prev,
                  Buffer buffers)
      : tile(tile),
        join(in.join),
        has_p(in.p != nullptr),
        has_prev(has_prev),
        x(buffers),
        p(buffers + tile.plan.buffer),
        mean(in.norm.centre(tile.channel)),
        scale(in.norm.factor(tile.channel)),
        bias(in.norm.shift(tile.channel)) {
    tile.fetch(in.x, x, tile.plan.halo);
    tile.clear(x);
    if (has_p) tile.fetch(in.p, p, tile.plan.halo);
    if (has_p) tile.clear(p);
  }
  __device__ Buffer next() const { return has_p ? p + tile.plan.buffer : p; }

  __device__ A joined(A of_x, A of_p) const {
    const A sum = (of_x - mean) * scale + (bias + of_p);
    return sum < A(0) ? A(0) : sum;  // NaN stays
  }
  // A row, with zeros outside of the map; without p, of_p remains as it is.
  __device__ void read(int row, Row<A>& of_x, Row<A>& of_p) const {
    tile.read(x, row, of_x);
    if (has_p) tile.read(p, row, of_p, has_prev || join);
    if (!join) return;
    const bool inside = tile.has_row(row);
#pragma unroll
    for (int e = 0; e < kColumns<A> + 2; ++e)
      of_x[e] = inside && tile.has(e) ? joined(of_x[e], of_p[e]) : A(0);
  }
  // Adds a row to those of o.
  __device__ void add(const Filters<A>& filters, int row, FilteredRows<A>& rows,
                      A (&done)[kColumns<A>]) const {
    Row<A> of_x, of_p;
    read(row, of_x, of_p);
    rows.add(of_x, filters.x, done);
    if (has_prev) rows.add(of_p, filters.p, done);
    if (has_prev || !has_p) return;
#pragma unroll
    for (int e = 0; e < kColumns<A>; ++e) rows.above[e] += filters.p[4] * of_p[e + 1];
  }
};

// The arriving gradients of a block, in shared memory.
template <class T>
struct GradientBuffers {
  const bool has_out, has_o;
  const Shared<T> out, o, next;

  __device__ GradientBuffers(const Arriving<T>& from, const Tiling& plan, Shared<T> buffers)
      : has_out(from.out != nullptr),
        has_o(from.o != nullptr),
        out(buffers),
        o(buffers + (has_out ? plan.buffer : 0)),
        next(buffers + ((has_out ? plan.buffer : 0) + (has_o ? plan.buffer : 0))) {}

  template <class Tile>
  __device__ void fetch(const Arriving<T>& from, const Tile& tile, int halo) const {
    if (has_out) tile.fetch(from.out, out, halo);
    if (has_o) tile.fetch(from.o, o, halo);
  }
};

// ---- sums over planes ---------------------------------------------------------------------------

// Sums of x and of p per piece; without p that of x twice.
template <class T>
__global__ void __launch_bounds__(kThreads)
    means_kernel(Cut cut, Features<T> in, Compute<T>* of_x, Compute<T>* of_p) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  const PackNorm<T> normed(in.norm, cut, part);
  Values<T, 2> sums = {};
  const T* const p = in.p == nullptr ? in.x : in.p;
  for_packs<T, 2>(part, {in.x, p}, [&](const Place& place, const Values<T, 2>& values) {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      const A joined = normed(values[0][e], e, values[1][e]);
      const A x = in.join ? (joined < A(0) ? A(0) : joined) : values[0][e];
      if (e >= place.begin && e < place.end) sums[0][e] += x;
      sums[1][e] += values[1][e];
    }
  });
  finish_sums<T, 2>(cut, part, sums, [&](Size plane, const A(&totals)[2]) {
    of_x[piece_of(cut, plane)] = totals[0];
    of_p[piece_of(cut, plane)] = totals[1];
  });
}

// Means of planes [batch, channels], as far as they are known: else null.
template <class A>
struct KnownMeans {
  const A *x, *p, *u, *e;  // u and e are known both or neither, and then p is
};

// u, p and e of a plane are shifted by their means or, where these are not known, by what they
// would be if x and p were everywhere as their means, or else as they are at its middle.
template <class A>
struct Shifts {
  A u = 0, p = 0, e = 0;

  template <class T, bool channels_last>
  __device__ Shifts(const Features<T>& in, const Maps<T, channels_last>& maps,
                    const KnownMeans<A>& means, const A (&v_filter)[9], const A (&e_filter)[9]) {
    const auto& tile = maps.tile;
    if (means.u != nullptr) {
      u = means.u[tile.plane];
      p = means.p[tile.plane];
      e = means.e[tile.plane];
      return;
    }
    const Size middle = tile.offset(tile.plan.height / 2, tile.plan.width / 2);
    if (maps.has_p) p = to_compute(in.p[middle]);
    const A raw = to_compute(in.x[middle]);
    const A x = means.x != nullptr ? means.x[tile.plane] : maps.join ? maps.joined(raw, p) : raw;
    if (means.p != nullptr) p = means.p[tile.plane];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      u += v_filter[i] * x;
      e += e_filter[i] * p;
    }
  }
};

// The sums of PlaneSum, backward those of GradientSum. The shifts are written to shifts [3, batch,
// channels].
template <class T, bool channels_last, bool backward>
__global__ void __launch_bounds__(kTileThreads, backward ? 4 : 3)
    plane_moments_kernel(const __grid_constant__ Tiling plan, Features<T> in,
                         Mixture<Compute<T>> mixture, Arriving<T> arriving,
                         KnownMeans<Compute<T>> means, Compute<T>* partial, Compute<T>* shifts) {
  using A = Compute<T>;
  constexpr int kCount = backward ? int(kGradientSums) : int(kFeatureSums);
  DLA_SHARED(A, exchange, kCount * kTileThreads);
  DLA_DYNAMIC_SHARED(T, buffers);
  const Tile<T, channels_last> tile(plan);
  const bool has_prev = mixture.prev_weight != nullptr;
  const Maps<T, channels_last> maps(in, tile, has_prev, buffers);
  const GradientBuffers<T> grads(arriving, plan, maps.next());
  if constexpr (backward) grads.fetch(arriving, tile, 0);
  A v_filter[9], e_filter[9], sums[kCount] = {};
  load_filter(mixture.v_weight, tile.channel, v_filter);
  load_filter(mixture.prev_weight, tile.channel, e_filter);
  const Shifts<A> shift(in, maps, means, v_filter, e_filter);
  wait_for_packs();
  __syncthreads();
  FilteredRows<A> rows_of_u, rows_of_e;
  A p_above[kColumns<A>] = {};
  for (int row = tile.begin - 1; row <= tile.end && tile.begin < tile.end; ++row) {
    Row<A> x_row, p_row = {};
    maps.read(row, x_row, p_row);
    A u[kColumns<A>], e[kColumns<A>];
    rows_of_u.move_on(-shift.u, u);
    rows_of_u.add(x_row, v_filter, u);
    rows_of_e.move_on(-shift.e, e);
    if (has_prev) rows_of_e.add(p_row, e_filter, e);
    if (row > tile.begin) {
      if constexpr (backward) {
        const bool arrives[] = {grads.has_out, grads.has_o};
        const Shared<T> arrived[] = {grads.out, grads.o};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (!arrives[m]) continue;
          Row<A> grad;  // 0 where there is no pixel
          tile.read(arrived[m], row - 1, grad, false);
#pragma unroll
          for (int i = 0; i < kColumns<A>; ++i) {
            const A g = grad[i + 1], products[] = {g, g * u[i], g * p_above[i], g * e[i]};
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[kG + 4 * m + k] += products[k];
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kColumns<A>; ++i) {
          if (i >= tile.count) continue;
          const A p = p_above[i], products[] = {u[i], u[i] * u[i], p, p * p, u[i] * p};
#pragma unroll
          for (int k = 0; k < 5; ++k) sums[kU + k] += products[k];
          if (!has_prev) continue;
          const A more[] = {e[i], e[i] * e[i], p * e[i], u[i] * e[i]};
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[kE + k] += more[k];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      if constexpr (!backward)
        if (row >= tile.begin && row < tile.end) sums[kX] += x_row[i + 1];
      p_above[i] = p_row[i + 1] - shift.p;
    }
  }
  const Size size = plan.batch * plan.pieces() * plan.channels;
  tile.template finish<kCount>(sums, exchange, [&](int i, Size piece, A total) {
    partial[i * size + piece] = total;
  });
  if (!tile.leads()) return;
  const A of_plane[] = {shift.u, shift.p, shift.e};
#pragma unroll
  for (int i = 0; i < 3; ++i) shifts[i * plan.batch * plan.channels + tile.plane] = of_plane[i];
}

// ---- output -------------------------------------------------------------------------------------

// out = scale o + added, of one plane.
template <class A>
struct PlaneNorm {
  A scale, added;

  __device__ PlaneNorm(const OutputNorm<A>& end, Size c, Size sample)
      : scale(end.drop(sample) * end.norm.factor(c)),
        added(end.drop(sample) * end.norm.shift(c) - end.norm.centre(c) * scale) {}
};

// out = [x] + m (gamma (o - mean) rstd + beta), and o if it is not null. If o is not wanted, norm
// and residual are part of the filters.
template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads, 4)
    stencil_kernel(const __grid_constant__ Tiling plan, Features<T> in,
                   Mixture<Compute<T>> mixture, OutputNorm<Compute<T>> norm, bool residual, T* out,
                   T* o) {
  using A = Compute<T>;
  DLA_DYNAMIC_SHARED(T, buffers);
  const Tile<T, channels_last> tile(plan);
  const Maps<T, channels_last> maps(in, tile, mixture.prev_weight != nullptr, buffers);
  const Shared<T> out_buffer = maps.next(), o_buffer = out_buffer + plan.buffer;
  const PlaneNorm<A> end(norm, tile.channel, tile.sample);
  Filters<A> filters(mixture, tile);
  A start = 0;
  if (o == nullptr) {
    start = end.added;
    filters.scale(end.scale);
    if (residual) filters.x[4] += A(1);
  }
  wait_for_packs();
  __syncthreads();
  FilteredRows<A> rows;
  for (int row = tile.begin - 1; row <= tile.end && tile.begin < tile.end; ++row) {
    A done[kColumns<A>];
    rows.move_on(start, done);
    maps.add(filters, row, rows, done);
    if (row <= tile.begin) continue;
    if (o != nullptr) {
      tile.put(row - 1, done, o_buffer, o);
      Row<A> x = {}, p;
      if (residual) maps.read(row - 1, x, p);
#pragma unroll
      for (int e = 0; e < kColumns<A>; ++e)
        done[e] = (residual ? x[e + 1] : A(0)) + (done[e] * end.scale + end.added);
    }
    tile.put(row - 1, done, out_buffer, out);
  }
  __syncthreads();
  tile.flush(out_buffer, out);
  if (o != nullptr) tile.flush(o_buffer, o);
}

// ---- gradients ----------------------------------------------------------------------------------

// What gradients_kernel sums up: correlations of g with x (times a) and with p, nine each; the
// gradient of a normed branch, alone and with the branch less its mean.
enum MapGradientSum : int {
  kVWeight = 0, kPrevWeight = 9, kBranch = 18, kBranchWithZ, kMapGradientSums
};

// g = out_scale grad_out + slope (o - mean) + level + grad_o: GradientOfO in arrays.
template <class A>
struct GradientFactors {
  const A* out_scale;             // [batch, channels]
  const A *mean, *slope, *level;  // [channels]; null: g does not depend on o
};

template <class T>
struct Gradients {
  using A = Compute<T>;
  Tiling plan;
  Features<T> in;
  Mixture<A> mixture;
  Arriving<T> arriving;
  GradientFactors<A> factors;
  const A *dy, *dpooled_p;  // [batch, channels], gradients of the means; dpooled_p may be null
  bool residual;
  bool scaled;  // whether dx is that of the branch, else that of the normed branch
  T *dx, *dp;   // dp may be null
  A* partial;   // [kMapGradientSums, batch, pieces, channels]
};

// A block makes g for its pixels and those around them, in shared memory; then dx, dp and the sums.
template <class T, bool channels_last>
struct GradientsOfTile {
  using A = Compute<T>;
  const Gradients<T>& pass;
  const Tile<T, channels_last>& tile;
  const Maps<T, channels_last>& maps;
  const GradientBuffers<T> grads;
  const Shared<A> g;
  const Filters<A> filters;
  const bool through_norm;
  const A out_scale;
  A mean = 0, slope = 0, level = 0, of_x, of_p = 0;
  A sums[kMapGradientSums] = {};

  __device__ GradientsOfTile(const Gradients<T>& pass, const Maps<T, channels_last>& maps,
                             Shared<A> memory)
      : pass(pass),
        tile(maps.tile),
        maps(maps),
        grads(pass.arriving, pass.plan, maps.next()),
        g(memory + maps_before_g(pass) * pass.plan.buffer * int(sizeof(T)) / int(sizeof(A))),
        filters(pass.mixture, tile),
        through_norm(pass.factors.slope != nullptr),
        out_scale(pass.factors.out_scale[tile.plane]) {
    grads.fetch(pass.arriving, tile, 1);
    tile.clear(g);
    const A pixels = static_cast<A>(static_cast<Size>(pass.plan.height) * pass.plan.width);
    of_x = pass.dy[tile.plane] / pixels;
    if (pass.dpooled_p != nullptr) of_p = pass.dpooled_p[tile.plane] / pixels;
    if (!through_norm) return;
    mean = pass.factors.mean[tile.channel];
    slope = pass.factors.slope[tile.channel];
    level = pass.factors.level[tile.channel];
  }

  __device__ static int maps_before_g(const Gradients<T>& pass) {
    return 1 + (pass.in.p != nullptr) + (pass.arriving.out != nullptr) +
           (pass.arriving.o != nullptr);
  }

  // g from o less its mean.
  __device__ A found(A centred, A of_out, A of_o) const {
    return slope * centred + (level + out_scale * of_out + of_o);
  }

  // g of the thread's columns; the first and the last rows of a block with one more.
  __device__ void make_g() const {
    const int begin = tile.begin - (tile.begin == tile.first_row && tile.has_row(tile.begin - 1));
    const int end = tile.end + (tile.end == tile.last_row && tile.has_row(tile.end));
    FilteredRows<A> rows;
    for (int row = begin - 1; row <= end && tile.begin < tile.end; ++row) {
      A done[kColumns<A>];
      rows.move_on(-mean, done);
      if (through_norm) maps.add(filters, row, rows, done);
      if (row <= begin) continue;
      Row<A> of_out = {}, of_o = {};
      if (grads.has_out) tile.read(grads.out, row - 1, of_out, false);
      if (grads.has_o) tile.read(grads.o, row - 1, of_o, false);
      const int at = tile.place(row - 1, tile.column);
#pragma unroll
      for (int e = 0; e < kColumns<A>; ++e)
        if (e < tile.count) g[at + e * tile.side] = found(done[e], of_out[e + 1], of_o[e + 1]);
    }
  }

  // g of the columns beside the block's.
  __device__ void make_sides() const {
    tile.each_beside([&](int row, int column) {
      A centred = -mean;
#pragma unroll
      for (int i = 0; i < 9; ++i) {
        const int r = row + i / 3 - 1, c = column + i % 3 - 1;
        if (!through_norm || !tile.has_row(r) || !tile.has_column(c)) continue;
        const int at = tile.place(r, c);
        const A p = maps.has_p ? to_compute(static_cast<T>(maps.p[at])) : A(0);
        const A x = to_compute(static_cast<T>(maps.x[at]));
        centred += filters.x[i] * (maps.join ? maps.joined(x, p) : x) + filters.p[i] * p;
      }
      const int at = tile.place(row, column);
      g[at] = found(centred, grads.has_out ? to_compute(static_cast<T>(grads.out[at])) : A(0),
                    grads.has_o ? to_compute(static_cast<T>(grads.o[at])) : A(0));
    });
  }

  // dx and dp of a row, and its share in the sums; around: g of the three rows about it.
  __device__ void spread(int row, const ThreeRows<A>& around) {
    const bool normed = pass.in.norm.mean != nullptr;
    Row<A> x, p = {}, of_out = {};
    tile.read(maps.x, row, x, false);
    if (maps.has_p) tile.read(maps.p, row, p, false);
    if (grads.has_out && pass.residual) tile.read(grads.out, row, of_out, false);
    A to_x[kColumns<A>], to_p[kColumns<A>];
#pragma unroll
    for (int e = 0; e < kColumns<A>; ++e) {
      const A raw = x[e + 1], own_p = p[e + 1];
      const A own_x = maps.join ? maps.joined(raw, own_p) : raw;
      to_x[e] = of_x + of_out[e + 1];
      to_p[e] = of_p;
      const bool counts = e < tile.count;
      around.spread(e, filters.x, own_x, counts, to_x[e], sums + kVWeight);
      if (maps.has_prev)
        around.spread(e, filters.p, own_p, counts, to_p[e], sums + kPrevWeight);
      else
        to_p[e] += filters.p[4] * around.rows[1][e + 1];
      if (maps.join && own_x <= A(0)) to_x[e] = 0;
      if (maps.join) to_p[e] += to_x[e];
      if (normed && counts) {
        sums[kBranch] += to_x[e];
        sums[kBranchWithZ] += to_x[e] * (raw - maps.mean);
      }
      if (pass.scaled) to_x[e] *= maps.scale;
    }
    // Nobody else reads these pixels of x and p any more.
    tile.put(row, to_x, maps.x, pass.dx);
    if (pass.dp != nullptr) tile.put(row, to_p, maps.p, pass.dp);
  }

  __device__ void spread_g() {
    ThreeRows<A> around;
    for (int row = tile.begin - 1; row <= tile.end && tile.begin < tile.end; ++row) {
      tile.read(g, row, around.move_on());
      if (row > tile.begin) spread(row - 1, around);
    }
  }

  __device__ void finish(Shared<A> exchange) {
#pragma unroll
    for (int i = 0; i < 9; ++i) sums[kVWeight + i] *= filters.a;
    const Size size = pass.plan.batch * pass.plan.pieces() * pass.plan.channels;
    tile.template finish<kMapGradientSums>(sums, exchange, [&](int i, Size piece, A total) {
      pass.partial[i * size + piece] = total;
    });
    tile.flush(maps.x, pass.dx);
    if (pass.dp != nullptr) tile.flush(maps.p, pass.dp);
  }
};

template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads, 3)
    gradients_kernel(const __grid_constant__ Gradients<T> pass) {
  using A = Compute<T>;
  DLA_SHARED(A, exchange, kMapGradientSums * kTileThreads);
  DLA_DYNAMIC_SHARED(T, buffers);
  DLA_DYNAMIC_SHARED(A, memory);
  const Tile<T, channels_last> tile(pass.plan);
  const Maps<T, channels_last> maps(pass.in, tile, pass.mixture.prev_weight != nullptr, buffers);
  GradientsOfTile<T, channels_last> gradients(pass, maps, memory);
  wait_for_packs();
  __syncthreads();
  gradients.make_g();
  gradients.make_sides();
  __syncthreads();
  gradients.spread_g();
  gradients.finish(exchange);
}

}  // namespace dla::cuda::light
