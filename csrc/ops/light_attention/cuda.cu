// The forward step: moments of u, p and e per plane (or just the pooled values), the small part on
// [batch, channels], the stencil. o is never written unless asked for.
#include "ops/light_attention/op.h"

#include <cmath>

#include "common/cuda/statistics.h"
#include "common/cuda/walk.h"
#include "ops/cell/op.h"

namespace dla::cuda {
namespace {

constexpr int kRows = 16;  // of a block of the stencil, which reads one more above and below

// The x of a step: a map, or with `join` ReLU(norm(map) + p), formed wherever it is read.
template <class T>
struct Features {
  using A = Compute<T>;
  const T *x, *p;  // p may be null
  bool join, normed;
  const A *weight, *bias, *mean, *var;  // of the branch's norm; weight and bias null: 1 and 0
  A eps;
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

  __device__ A p(Size i) const { return to_compute(p_map[i]); }
  __device__ A x(Size i) const {
    const A found = to_compute(x_map[i]);
    if (!join) return found;
    const A sum = (found - mean) * scale + (bias + p(i));
    return sum < A(0) ? A(0) : sum;  // NaN stays
  }
};

template <class A>
__device__ inline void load_filter(const A* weight, const Path& path, A (&filter)[9]) {
#pragma unroll
  for (int i = 0; i < 9; ++i)
    filter[i] = weight == nullptr || !path.exists ? A(0) : weight[path.channel * 9 + i];
}

// What is known of every plane, arrays [batch, channels].
template <class A>
struct Summary {
  A *y, *pooled_p, *a, *d;

  Summary(void* data, Size planes)
      : y(static_cast<A*>(data)), pooled_p(y + planes), a(pooled_p + planes), d(a + planes) {}
};

// Sums over a plane; u, p and e are taken about their values at one pixel (kShift*).
enum Sum : int { kX, kU, kUU, kP, kPP, kUP, kE, kEE, kPE, kUE, kSums };
enum Shift : int { kShiftU = kSums, kShiftP, kShiftE, kFields };

// ---- passes over maps ---------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    means_kernel(Walk walk, Features<T> in, Compute<T>* y, Compute<T>* pooled_p) {
  using A = Compute<T>;
  const Path path(walk);
  const Reader<T> read(in, path);
  A sums[2] = {};
  for (int column = path.first_column; column < path.width && path.exists; column += walk.across)
    for (int row = path.first_row; row < path.last_row; ++row) {
      const Size i = path.offset(row, column);
      sums[0] += read.x(i);
      if (pooled_p != nullptr) sums[1] += read.p(i);
    }
  finish_walk<A, 2>(walk, path, sums, [&](const A(&totals)[2]) {
    const A area = static_cast<A>(static_cast<Size>(path.height) * path.width);
    y[path.plane] = totals[0] / area;
    if (pooled_p != nullptr) pooled_p[path.plane] = totals[1] / area;
  });
}

// table: [kFields, batch, channels].
template <class T>
__global__ void __launch_bounds__(kThreads)
    plane_moments_kernel(Walk walk, Features<T> in, const Compute<T>* v_weight,
                   const Compute<T>* prev_weight, Compute<T>* table, Compute<T>* y,
                   Compute<T>* pooled_p) {
  using A = Compute<T>;
  const Path path(walk);
  const Reader<T> read(in, path);
  const auto read_x = [&](Size i) { return read.x(i); };
  const auto read_p = [&](Size i) { return read.p(i); };
  const bool has_p = in.p != nullptr;
  A v_filter[9], e_filter[9], shift[3] = {}, sums[kSums] = {};
  load_filter(v_weight, path, v_filter);
  load_filter(prev_weight, path, e_filter);
  if (path.exists) {
    const int row = path.height / 2, column = path.width / 2;
    Window<A> window;
    window.begin(path, read_x, row, column);
    window.next(path, read_x, row + 1, column);
    shift[0] = window.dot(v_filter);
    if (has_p) {
      window.begin(path, read_p, row, column);
      window.next(path, read_p, row + 1, column);
      shift[1] = window.centre();
      shift[2] = window.dot(e_filter);
    }
  }
  for (int column = path.first_column; column < path.width && path.exists; column += walk.across) {
    Window<A> x_window, p_window;
    x_window.begin(path, read_x, path.first_row, column);
    if (has_p) p_window.begin(path, read_p, path.first_row, column);
    for (int row = path.first_row; row < path.last_row; ++row) {
      x_window.next(path, read_x, row + 1, column);
      const A u = x_window.dot(v_filter) - shift[0];
      sums[kX] += x_window.centre();
      sums[kU] += u;
      sums[kUU] += u * u;
      if (!has_p) continue;
      p_window.next(path, read_p, row + 1, column);
      const A p = p_window.centre() - shift[1], e = p_window.dot(e_filter) - shift[2];
      sums[kP] += p;
      sums[kPP] += p * p;
      sums[kUP] += u * p;
      sums[kE] += e;
      sums[kEE] += e * e;
      sums[kPE] += p * e;
      sums[kUE] += u * e;
    }
  }
  finish_walk<A, kSums>(walk, path, sums, [&](const A(&totals)[kSums]) {
    const Size planes = walk.batch * walk.channels;
#pragma unroll
    for (int i = 0; i < kSums; ++i) table[i * planes + path.plane] = totals[i];
#pragma unroll
    for (int i = 0; i < 3; ++i) table[(kShiftU + i) * planes + path.plane] = shift[i];
    const A area = static_cast<A>(static_cast<Size>(path.height) * path.width);
    y[path.plane] = totals[kX] / area;
    if (pooled_p != nullptr) pooled_p[path.plane] = shift[1] + totals[kP] / area;
  });
}

// The norm of o; pointers null where there is nothing.
template <class A>
struct OutputNorm {
  const A *weight, *bias, *mean, *var, *drop_scale;
  A eps;
};

// out = [x] + m (gamma (o - mean) rstd + beta), o = a u + lam (d p + e).
template <class T>
__global__ void __launch_bounds__(kThreads)
    stencil_kernel(Walk walk, Features<T> in, const Compute<T>* v_weight,
                   const Compute<T>* prev_weight, const Compute<T>* a, const Compute<T>* d,
                   const Compute<T>* lam, OutputNorm<Compute<T>> norm, bool residual, T* out,
                   T* o) {
  using A = Compute<T>;
  const Path path(walk);
  if (!path.exists) return;
  const Reader<T> read(in, path);
  const auto read_x = [&](Size i) { return read.x(i); };
  const auto read_p = [&](Size i) { return read.p(i); };
  const Size c = path.channel;
  A x_filter[9], p_filter[9];
  load_filter(v_weight, path, x_filter);
  load_filter(prev_weight, path, p_filter);
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    x_filter[i] *= a[path.plane];
    p_filter[i] *= lam[c];
  }
  p_filter[4] += lam[c] * d[path.plane];
  const A drop = norm.drop_scale == nullptr ? A(1) : norm.drop_scale[path.sample];
  const A mean = norm.mean == nullptr ? A(0) : norm.mean[c];
  const A rstd = norm.mean == nullptr ? A(1) : inverse_sqrt(norm.var[c] + norm.eps);
  const A scale = drop * (norm.weight == nullptr ? rstd : rstd * norm.weight[c]);
  const A shift = norm.bias == nullptr ? A(0) : drop * norm.bias[c];
  for (int column = path.first_column; column < path.width; column += walk.across) {
    Window<A> x_window, p_window;
    x_window.begin(path, read_x, path.first_row, column);
    if (in.p != nullptr) p_window.begin(path, read_p, path.first_row, column);
    for (int row = path.first_row; row < path.last_row; ++row) {
      x_window.next(path, read_x, row + 1, column);
      A mixed = x_window.dot(x_filter);
      if (in.p != nullptr) {
        p_window.next(path, read_p, row + 1, column);
        mixed += p_window.dot(p_filter);
      }
      const Size i = path.offset(row, column);
      if (o != nullptr) from_compute(mixed, o[i]);
      const A branch = (mixed - mean) * scale + shift;
      from_compute(residual ? x_window.centre() + branch : branch, out[i]);
    }
  }
}

// ---- the small part -----------------------------------------------------------------------------

// a = sigmoid(q . k / sqrt(head_dim)) of every head, a warp each.
template <class A>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(Size heads, int channels, int head_dim, int taps, const A* y, const A* q_weight,
                  const A* k_weight, A* a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Size head = (static_cast<Size>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (head >= heads) return;
  const Size row = head * head_dim / channels * channels;
  const int first = static_cast<int>(head * head_dim - row);
  A sum = 0;
  for (int c = first + lane; c < first + head_dim; c += kWarp) {
    A q = 0, k = 0;
    for (int t = 0; t < taps; ++t) {
      const int from = c + t - taps / 2;
      if (from < 0 || from >= channels) continue;
      q += q_weight[t] * y[row + from];
      k += k_weight[t] * y[row + from];
    }
    sum += q * k;
  }
  const A scaled = sum_lanes(sum, kWarp) / std::sqrt(static_cast<A>(head_dim));
  const A score = A(1) / (A(1) + std::exp(-scaled));
  for (int c = first + lane; c < first + head_dim; c += kWarp) a[row + c] = score;
}

// d from the cell's output; without (null) there is no gate, nor a pooled p.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gates_kernel(Size planes, const A* output, bool sigmoid, A* d, A* pooled_p) {
  const Size i = static_cast<Size>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= planes) return;
  if (output == nullptr) {
    d[i] = A(1);
    pooled_p[i] = A(0);
  } else {
    d[i] = sigmoid ? A(1) / (A(1) + std::exp(-output[i])) : output[i];
  }
}

// Mean and centred sum of squares of o in one plane.
struct PlaneOfO {
  double mean, square;

  template <class A>
  __device__ PlaneOfO(const A* table, Size planes, Size i, double pixels, double a, double d,
                      double lam) {
    const auto at = [&](int field) { return static_cast<double>(table[field * planes + i]); };
    const auto mix = [&](int u, int p, int e) {
      return a * at(u) + lam * (d * at(p) + at(e));
    };
    const double sum = mix(kU, kP, kE);
    mean = mix(kShiftU, kShiftP, kShiftE) + sum / pixels;
    square = a * mix(kUU, kUP, kUE) + lam * (d * mix(kUP, kPP, kPE) + mix(kUE, kPE, kEE)) -
             sum * sum / pixels;
    if (square < 0) square = 0;
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    output_statistics_kernel(Size batch, Size channels, double pixels, const A* table, const A* a,
                             const A* d, const A* lam, A* mean, A* var) {
  const auto plane = [&](Size i) {
    return PlaneOfO(table, batch * channels, i, pixels, a[i], d[i], lam[own_channel(channels)]);
  };
  const double count = static_cast<double>(batch) * pixels;
  const double centre = add_rows(batch, channels, [&](Size, Size i) {
    return pixels * plane(i).mean;
  }) / count;
  const double square = add_rows(batch, channels, [&](Size, Size i) {
    const PlaneOfO found = plane(i);
    return found.square + pixels * (found.mean - centre) * (found.mean - centre);
  });
  if (!writes_channel(channels)) return;
  mean[own_channel(channels)] = static_cast<A>(centre);
  var[own_channel(channels)] = static_cast<A>(square / count);
}

// ---- host ---------------------------------------------------------------------------------------

template <class T>
struct ForwardStep {
  using A = Compute<T>;
  const LightAttentionForward& args;
  const Call call{"light_attention", args.batch, args.channels, args.height * args.width,
                  args.stream};
  const Size planes = args.batch * args.channels;
  const Summary<A> summary{args.summary, planes};
  // Working memory: numbers of planes, the state that the gate's cell makes.
  A* const table = static_cast<A*>(args.scratch);
  A* const gate_state = table + kFields * planes;

  static const A* small(const void* p) { return static_cast<const A*>(p); }
  static A* small(void* p) { return static_cast<A*>(p); }
  bool dynamic() const { return !args.cell_params.empty(); }
  bool gated() const { return dynamic() && args.p != nullptr; }

  Walk walk(int rows) const {
    return walk_map(args.batch, args.channels, args.height, args.width, args.channels_last, rows);
  }
  Cut cut() const {
    return cut_map<T>(args.batch, args.channels, args.height * args.width, args.channels_last, true,
                      {args.x});
  }

  // Statistics of the branch, if they are of the batch.
  Features<T> features() const {
    const bool running = args.branch_norm == Norm::running;
    const void* mean = running ? args.branch_mean_in : args.branch_mean;
    const void* var = running ? args.branch_var_in : args.branch_var;
    const T* x = static_cast<const T*>(args.x);
    if (args.branch_norm == Norm::batch) {
      const Cut cut = this->cut();
      A *means = table, *squares = table + planes;
      launch(call, moments_kernel<T>, {cut.blocks, kThreads}, cut, x, means, squares);
      launch(call, statistics_kernel<A>, channel_grid(args.channels), cut, means, squares,
             small(args.branch_mean), small(args.branch_var));
    }
    return {x, static_cast<const T*>(args.p), args.join, args.branch_norm != Norm::none,
            small(args.branch_weight), small(args.branch_bias), small(mean), small(var),
            static_cast<A>(args.branch_eps)};
  }

  void evaluate_cell(const void* y, const void* state, void* out, bool first_sample) const {
    CellForward cell{y, state, args.cell_params, out, args.batch, args.channels, args.hidden,
                     static_cast<CellKind>(args.cell), static_cast<Activation>(args.activation),
                     sizeof(A) == 8 ? DType::f64 : DType::f32, args.threads, args.stream,
                     first_sample};
    cell_forward(cell);
  }

  // From the pooled values: scores, new state, gates.
  void small_part() const {
    const Size heads = planes / args.head_dim;
    launch(call, scores_kernel<A>, {ceil_div(heads * kWarp, kThreads), kThreads}, heads,
           static_cast<int>(args.channels), static_cast<int>(args.head_dim),
           static_cast<int>(args.kernel_size), summary.y, small(args.q_weight),
           small(args.k_weight), summary.a);
    if (dynamic()) evaluate_cell(summary.y, args.state, args.new_state, false);
    if (gated()) evaluate_cell(summary.pooled_p, args.new_state, gate_state, args.first_sample);
    launch(call, gates_kernel<A>, {ceil_div(planes, kThreads), kThreads}, planes,
           gated() ? gate_state : nullptr, args.sigmoid_gate, summary.d, summary.pooled_p);
  }

  OutputNorm<A> norm() const {
    const bool none = args.norm == Norm::none, running = args.norm == Norm::running;
    return {small(args.norm_weight), small(args.norm_bias),
            none ? nullptr : small(running ? args.mean_in : args.mean),
            none ? nullptr : small(running ? args.var_in : args.var), small(args.drop_scale),
            static_cast<A>(args.eps)};
  }

  void run() const {
    const Features<T> in = features();
    const A *v_weight = small(args.v_weight), *prev_weight = small(args.prev_weight);
    A* pooled_p = gated() ? summary.pooled_p : nullptr;
    const Walk planewise = walk(0), strips = walk(kRows);
    if (args.norm == Norm::batch)
      launch(call, plane_moments_kernel<T>, {planewise.blocks, kThreads}, planewise, in, v_weight,
             prev_weight, table, summary.y, pooled_p);
    else
      launch(call, means_kernel<T>, {planewise.blocks, kThreads}, planewise, in, summary.y,
             pooled_p);
    small_part();
    if (args.norm == Norm::batch)
      launch(call, output_statistics_kernel<A>, channel_grid(args.channels), args.batch,
             args.channels, static_cast<double>(args.height * args.width), table, summary.a,
             summary.d, small(args.lam), small(args.mean), small(args.var));
    launch(call, stencil_kernel<T>, {strips.blocks, kThreads}, strips, in, v_weight, prev_weight,
           summary.a, summary.d, small(args.lam), norm(), args.residual, static_cast<T*>(args.out),
           static_cast<T*>(args.o));
  }
};

}  // namespace

void light_attention_forward(const LightAttentionForward& args) {
  with_element_type(args.dtype, [&](auto element) {
    ForwardStep<decltype(element)>{args}.run();
  });
}

}  // namespace dla::cuda
