// The passes of light_attention over whole feature maps on GPUs; passes.h says what they are for. A
// block takes a strip of rows of a few channels, and leaves sums of that. o and g = dL/do are made
// wherever they are needed, never stored unless asked for.
#pragma once

#include "common/cuda/walk.h"
#include "ops/light_attention/plane_sums.h"

namespace dla::cuda::light {

// The x of a step: a map, or with `join` ReLU(norm(map) + p), formed wherever it is read.
template <class T>
struct Features {
  using A = Compute<T>;
  const T *x, *p;  // p may be null
  bool join, normed;
  const A *weight, *bias, *mean, *var;  // of the branch's norm; weight and bias null: 1 and 0
  A eps;
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

// The reader of both maps in one channel.
template <class T>
struct Reader {
  using A = Compute<T>;
  const T *x_map, *p_map;
  bool join;
  A mean = 0, scale = 1, bias = 0;

  __device__ Reader(const Features<T>& in, const Path& path)
      : x_map(in.x), p_map(in.p), join(in.join) {
    if (!in.normed || !path.exists) return;
    const Size c = path.channel;
    mean = in.mean[c];
    scale = inverse_sqrt(in.var[c] + in.eps);
    if (in.weight != nullptr) scale *= in.weight[c];
    if (in.bias != nullptr) bias = in.bias[c];
  }

  // Less the mean that the norm takes.
  __device__ A branch(Size i) const { return to_compute(x_map[i]) - mean; }
  __device__ A p(Size i) const { return to_compute(p_map[i]); }
  __device__ A x(Size i) const {
    if (!join) return to_compute(x_map[i]);
    const A sum = branch(i) * scale + (bias + p(i));
    return sum < A(0) ? A(0) : sum;  // NaN stays
  }
};

// What is around a pixel of both maps.
template <class T>
struct Windows {
  using A = Compute<T>;
  const Reader<T>& read;
  const bool has_p, has_prev;  // without prev_weight just the pixels of p itself are needed
  Window<A> x, p = {};

  __device__ Windows(const Reader<T>& read, const Mixture<A>& mixture)
      : read(read), has_p(read.p_map != nullptr), has_prev(mixture.prev_weight != nullptr) {}

  __device__ void next(const Path& path, int row, int column) {
    x.next(path, [&](Size i) { return read.x(i); }, row, column);
    if (has_p) p.next(path, [&](Size i) { return read.p(i); }, row, column, has_prev);
  }
  // As that of a Window.
  __device__ void begin(const Path& path, int row, int column) {
    next(path, row - 1, column);
    next(path, row, column);
  }
};

template <class A>
__device__ inline void load_filter(const A* weight, const Path& path, A (&filter)[9]) {
#pragma unroll
  for (int i = 0; i < 9; ++i)
    filter[i] = weight == nullptr || !path.exists ? A(0) : weight[path.channel * 9 + i];
}

// Of one plane: o is the sum of both maps, filtered.
template <class A>
struct Filters {
  A a = 0, x[9], p[9];

  __device__ Filters(const Mixture<A>& mixture, const Path& path) {
    load_filter(mixture.v_weight, path, x);
    load_filter(mixture.prev_weight, path, p);
    if (!path.exists) return;
    a = mixture.a[path.plane];
    const A lam = mixture.lam[path.channel];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      x[i] *= a;
      p[i] *= lam;
    }
    p[4] += lam * mixture.d[path.plane];
  }

  template <class T>
  __device__ A mixed(const Windows<T>& around) const {
    const A of_x = around.x.dot(x);
    return around.has_p ? of_x + around.p.dot(p) : of_x;
  }
};

// ---- sums over planes ---------------------------------------------------------------------------

// Puts sums of a block's rows of a channel to [count, batch, strips, channels].
template <class A, int count>
__device__ inline void put_sums(const Walk& walk, const Path& path, const A (&totals)[count],
                                A* partial) {
  const Size size = walk.batch * walk.strips * walk.channels;
#pragma unroll
  for (int i = 0; i < count; ++i) partial[i * size + path.piece] = totals[i];
}

// Sums of x and of p.
template <class T>
__global__ void __launch_bounds__(kThreads)
    means_kernel(Walk walk, Features<T> in, bool of_p, Compute<T>* partial) {
  using A = Compute<T>;
  const Path path(walk);
  const Reader<T> read(in, path);
  A sums[2] = {};
  for (int column = path.first_column; column < path.width && path.exists; column += walk.across)
    for (int row = path.first_row; row < path.last_row; ++row) {
      const Size i = path.offset(row, column);
      sums[0] += read.x(i);
      if (of_p) sums[1] += read.p(i);
    }
  finish_walk<A, 2>(walk, path, sums, [&](const A(&totals)[2]) {
    put_sums(walk, path, totals, partial);
  });
}

// u, p and e at the middle of a plane, by which they are shifted.
template <class T>
__device__ inline void load_shifts(const Path& path, Windows<T>& around,
                                   const Compute<T> (&v_filter)[9],
                                   const Compute<T> (&e_filter)[9], Compute<T> (&shifts)[3]) {
  const int row = path.height / 2, column = path.width / 2;
  around.begin(path, row, column);
  around.next(path, row + 1, column);
  shifts[0] = around.x.dot(v_filter);
  shifts[1] = around.p.centre();
  shifts[2] = around.p.dot(e_filter);
}

// The first sums of PlaneSum: those of the features, backward also those with gradients. The shifts
// are written to shifts [3, batch, channels].
template <class T, bool backward>
__global__ void __launch_bounds__(kThreads)
    plane_moments_kernel(Walk walk, Features<T> in, Mixture<Compute<T>> mixture,
                         Arriving<T> arriving, Compute<T>* partial, Compute<T>* shifts) {
  using A = Compute<T>;
  constexpr int kCount = backward ? kSums : kG;
  const Path path(walk);
  const Reader<T> read(in, path);
  Windows<T> around(read, mixture);
  A v_filter[9], e_filter[9], shift[3], sums[kCount] = {};
  load_filter(mixture.v_weight, path, v_filter);
  load_filter(mixture.prev_weight, path, e_filter);
  load_shifts(path, around, v_filter, e_filter, shift);
  for (int column = path.first_column; column < path.width && path.exists; column += walk.across) {
    around.begin(path, path.first_row, column);
    for (int row = path.first_row; row < path.last_row; ++row) {
      around.next(path, row + 1, column);
      const A u = around.x.dot(v_filter) - shift[0];
      const A p = around.p.centre() - shift[1], e = around.p.dot(e_filter) - shift[2];
      const A x = around.x.centre();
      const A of_features[] = {x, u, u * u, p, p * p, u * p, e, e * e, p * e, u * e};
#pragma unroll
      for (int i = 0; i < kG; ++i) sums[i] += of_features[i];
      if constexpr (backward) {
        const T* const maps[] = {arriving.out, arriving.o};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (maps[m] == nullptr) continue;
          const A g = to_compute(maps[m][path.offset(row, column)]);
          const A with_g[] = {g, g * u, g * p, g * e};
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[kG + 4 * m + i] += with_g[i];
        }
      }
    }
  }
  finish_walk<A, kCount>(walk, path, sums, [&](const A(&totals)[kCount]) {
    put_sums(walk, path, totals, partial);
    if (path.first_row > 0) return;
#pragma unroll
    for (int i = 0; i < 3; ++i) shifts[i * walk.batch * walk.channels + path.plane] = shift[i];
  });
}

// ---- output -------------------------------------------------------------------------------------

// The norm of o; pointers null where there is nothing.
template <class A>
struct OutputNorm {
  const A *weight, *bias, *mean, *var, *drop_scale;
  double eps;
};

// out = [x] + m (gamma (o - mean) rstd + beta), and o if it is not null. Two blocks to a processor:
// for a third one ptxas would spill.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    stencil_kernel(Walk walk, Features<T> in, Mixture<Compute<T>> mixture,
                   OutputNorm<Compute<T>> norm, bool residual, T* out, T* o) {
  using A = Compute<T>;
  const Path path(walk);
  if (!path.exists) return;
  const Reader<T> read(in, path);
  const Filters<A> filters(mixture, path);
  Windows<T> around(read, mixture);
  const Size c = path.channel;
  const A drop = norm.drop_scale == nullptr ? A(1) : norm.drop_scale[path.sample];
  const A mean = norm.mean == nullptr ? A(0) : norm.mean[c];
  const A rstd =
      norm.mean == nullptr ? A(1) : inverse_sqrt(norm.var[c] + static_cast<A>(norm.eps));
  const A scale = drop * (norm.weight == nullptr ? rstd : rstd * norm.weight[c]);
  const A shift = norm.bias == nullptr ? A(0) : drop * norm.bias[c];
  for (int column = path.first_column; column < path.width; column += walk.across) {
    around.begin(path, path.first_row, column);
    for (int row = path.first_row; row < path.last_row; ++row) {
      around.next(path, row + 1, column);
      const A mixed = filters.mixed(around);
      const Size i = path.offset(row, column);
      if (o != nullptr) from_compute(mixed, o[i]);
      const A branch = (mixed - mean) * scale + shift;
      from_compute(residual ? around.x.centre() + branch : branch, out[i]);
    }
  }
}

// ---- gradients ----------------------------------------------------------------------------------

// What gradients_kernel sums up: correlations of g with x (times a) and with p, nine each; the
// gradient of a normed branch, alone and with the branch less its mean.
enum GradientSum : int { kVWeight = 0, kPrevWeight = 9, kBranch = 18, kBranchWithZ, kGradientSums };

// g = out_scale grad_out + slope (o - mean) + level + grad_o: PlaneOfO's GradientOfO in arrays.
template <class A>
struct GradientFactors {
  const A* out_scale;             // [batch, channels]
  const A *mean, *slope, *level;  // [channels]; null: g does not depend on o
};

template <class T>
struct Gradients {
  using A = Compute<T>;
  Walk walk;
  Features<T> in;
  Mixture<A> mixture;
  Arriving<T> arriving;
  GradientFactors<A> factors;
  const A *dy, *dpooled_p;  // [batch, channels], gradients of the means; dpooled_p may be null
  bool residual;
  bool scaled;  // whether dx is that of the branch, else that of the normed branch
  T *dx, *dp;   // dp may be null
  A* partial;   // [kGradientSums, batch, strips, channels]
};

// A thread's share in the gradients of its channel.
template <class T>
struct GradientsOfColumn {
  using A = Compute<T>;
  const Gradients<T>& pass;
  const Path& path;
  const Reader<T>& read;
  const Filters<A> filters;
  A out_scale = 0, mean = 0, slope = 0, level = 0, of_x = 0, of_p = 0;
  A sums[kGradientSums] = {};
  A arrived[2] = {};  // gradients of out at the last two rows
  Window<A> g = {};

  __device__ GradientsOfColumn(const Gradients<T>& pass, const Path& path, const Reader<T>& read)
      : pass(pass), path(path), read(read), filters(pass.mixture, path) {
    if (!path.exists) return;
    const A pixels = static_cast<A>(static_cast<Size>(path.height) * path.width);
    of_x = pass.dy[path.plane] / pixels;
    if (pass.dpooled_p != nullptr) of_p = pass.dpooled_p[path.plane] / pixels;
    out_scale = pass.factors.out_scale[path.plane];
    if (pass.factors.slope == nullptr) return;
    mean = pass.factors.mean[path.channel];
    slope = pass.factors.slope[path.channel];
    level = pass.factors.level[path.channel];
  }

  // g at a pixel; 0 outside.
  __device__ A make_g(const Windows<T>& around, int row, int column) {
    arrived[0] = arrived[1];
    arrived[1] = 0;
    if (!path.inside(row, column)) return 0;
    const Size i = path.offset(row, column);
    A found = 0;
    if (pass.factors.slope != nullptr) found = slope * (filters.mixed(around) - mean) + level;
    if (pass.arriving.o != nullptr) found += to_compute(pass.arriving.o[i]);
    if (pass.arriving.out == nullptr) return found;
    arrived[1] = to_compute(pass.arriving.out[i]);
    return found + out_scale * arrived[1];
  }

  __device__ void correlate(const Windows<T>& around, A middle) {
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      sums[kVWeight + i] += middle * around.x.at[i];
      sums[kPrevWeight + i] += middle * around.p.at[i];
    }
  }

  // dx and dp of the pixel that g is now around; x is there.
  __device__ void spread(Size i, A x) {
    A to_x = of_x + g.transposed_dot(filters.x);
    if (pass.residual) to_x += arrived[0];
    if (read.join && x <= A(0)) to_x = 0;
    if (pass.in.normed) {
      sums[kBranch] += to_x;
      sums[kBranchWithZ] += to_x * read.branch(i);
    }
    from_compute(pass.scaled ? to_x * read.scale : to_x, pass.dx[i]);
    if (pass.dp == nullptr) return;
    const A to_p = of_p + g.transposed_dot(filters.p);
    from_compute(read.join ? to_p + to_x : to_p, pass.dp[i]);
  }

  __device__ void finish() {
    finish_walk<A, kGradientSums>(pass.walk, path, sums, [&](A(&totals)[kGradientSums]) {
#pragma unroll
      for (int i = 0; i < 9; ++i) totals[kVWeight + i] *= filters.a;
      put_sums(pass.walk, path, totals, pass.partial);
    });
  }
};

// Every thread makes g down its column, beginning a row early and ending a row late, and finds that
// of the columns beside it in shared memory. If the map is wider than a block, it takes several
// turns, in which the first and the last column only have their g made: they are another turn's.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const __grid_constant__ Gradients<T> pass) {
  using A = Compute<T>;
  DLA_SHARED(A, row_of_g, 2 * kThreads);  // the next row is written while this one is read
  const Walk& walk = pass.walk;
  const Path path(walk);
  const Reader<T> read(pass.in, path);
  GradientsOfColumn<T> column_of(pass, path, read);
  Windows<T> around(read, pass.mixture);
  const int beside = walk.channels_last ? walk.together : 1;  // threads from column to column
  const int halo = walk.across < walk.width ? 1 : 0, own = walk.across - 2 * halo;
  const int lane = path.first_column;
  int mine = static_cast<int>(threadIdx.x);
  for (int first = 0; first < walk.width; first += own) {
    const int column = first - halo + lane;
    const bool owns =
        path.exists && lane >= halo && lane < halo + own && column < walk.width;
    around.begin(path, path.first_row - 1, column);
    for (int row = path.first_row - 1; row <= path.last_row; ++row) {
      around.next(path, row + 1, column);
      const A middle = column_of.make_g(around, row, column);
      if (owns && row >= path.first_row && row < path.last_row) column_of.correlate(around, middle);
      row_of_g[mine] = middle;
      __syncthreads();
      column_of.g.push(lane > 0 ? static_cast<A>(row_of_g[mine - beside]) : A(0), middle,
                       lane + 1 < walk.across ? static_cast<A>(row_of_g[mine + beside]) : A(0));
      mine = mine < kThreads ? mine + kThreads : mine - kThreads;
      if (owns && row > path.first_row)
        column_of.spread(path.offset(row - 1, column), around.x.above());
    }
  }
  column_of.finish();
}

}  // namespace dla::cuda::light
