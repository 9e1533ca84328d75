// A step of a cell in one launch: a block takes a few rows of the batch through all layers, with
// their values in shared memory, and reads every weight once. Backward, a second launch sums the
// gradients of the weights over the batch.
#include <algorithm>
#include <cmath>

#include "common/cuda/launch.h"
#include "ops/cell/tails.h"

namespace dla::cuda {
namespace cell {

constexpr int kThreads = 256;
constexpr int kMostGates = 4;

// Rows of the batch to a block; 1 where the values of so many would not fit. float64 is there for
// gradcheck, and not worth the time to compile more.
template <class A>
constexpr int kMostRows = sizeof(A) == 8 ? 1 : 8;

// What a kind of cell is, for kernels: the tail's constants as numbers.
struct Kind {
  CellKind kind;
  CellLayout layout;
  Activation gate_activation[kMostGates], squash;
};

Kind kind_of(CellKind kind) {
  return with_tail(kind, [&](auto tail) {
    using Tail = decltype(tail);
    Kind found{kind, Tail::layout, {}, Activation::identity};
    std::copy_n(Tail::gate_activation, Tail::gates, found.gate_activation);
    if constexpr (Tail::layout.slots > 1) found.squash = Tail::squash;
    return found;
  });
}

template <class A>
struct Step {
  Kind kind;
  Activation activation;
  const A *y, *state, *grad_out;
  const A* params[kMaxCellParams];
  A *out, *grad_y, *grad_state;
  A *grad_gates, *hidden, *grad_hidden, *normalised;  // rows of the batch, for the second launch
  Size batch;
  int channels, units;  // units: of a hidden layer; 0 without
  bool packs;           // rows of weights are packs of 16 bytes
  bool first_sample;    // every row reads row 0 of the state

  __device__ int gate_inputs() const { return units > 0 ? units : channels; }
};

template <class A>
__device__ A activate(Activation kind, A u) {
  switch (kind) {
    case Activation::sigmoid: return A(1) / (A(1) + std::exp(-u));
    case Activation::tanh: return std::tanh(u);
    case Activation::relu: return u < A(0) ? A(0) : u;
    case Activation::identity: break;
  }
  return u;
}

// Gradient of u from that of a = act(u).
template <class A>
__device__ A activation_gradient(Activation kind, A a, A grad) {
  switch (kind) {
    case Activation::sigmoid: return grad * a * (A(1) - a);
    case Activation::tanh: return grad * (A(1) - a * a);
    case Activation::relu: return a <= A(0) ? A(0) : grad;
    case Activation::identity: break;
  }
  return grad;
}

// ---- panels and products ------------------------------------------------------------------------

// Where the panels lie, the vectors of values that a block works on: the number of their first
// value.
struct Panels {
  int inputs, hidden, gates, grad_memory, grad_hidden, partial, size;

  DLA_HOST_DEVICE Panels(const CellLayout& layout, int channels, int units, bool backward) {
    inputs = 0;  // y and the other source
    hidden = 2 * channels;
    gates = hidden + layout.branches * units;  // then their gradients
    grad_memory = gates + layout.gates * channels;
    grad_hidden = grad_memory + (backward ? channels : 0);
    partial = grad_hidden + (backward ? layout.branches * units : 0);
    size = partial + (backward ? kThreads : 0);
  }
};

// Values lie as [n][rows]. Lanes that take packs of weights read values kPack apart: the gap
// between these keeps them off each other's banks.
constexpr int kGap = 4;

template <int rows>
DLA_HOST_DEVICE constexpr int shared_elements(int values) {
  return rows == 1 ? values : values * rows + values / kGap * kGap;
}

template <class A, int rows>
struct Tile {
  const Step<A>& step;
  const Panels at;
  const Shared<A> shared;
  const Size first_row;

  __device__ Tile(const Step<A>& step, const Shared<A>& shared, bool backward)
      : step(step),
        at(step.kind.layout, step.channels, step.units, backward),
        shared(shared),
        first_row(static_cast<Size>(blockIdx.x) * rows) {}

  __device__ const CellLayout& layout() const { return step.kind.layout; }
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  // Value n of row r.
  __device__ decltype(auto) value(int n, int r) const {
    return shared[shared_elements<rows>(n) + r];
  }
  __device__ bool exists(int r) const { return first_row + r < step.batch; }

  // The source besides y: what the other branch reads, or what y is joined with.
  __device__ Source other() const {
    return layout().branches == 2 ? layout().branch[1].source[0] : layout().branch[0].source[0];
  }
  __device__ int input(Source source) const {
    return at.inputs + (source == kInput ? 0 : step.channels);
  }
  __device__ int hidden(int b) const { return at.hidden + b * step.units; }
  __device__ int grad_hidden(int b) const { return at.grad_hidden + b * step.units; }
  __device__ A state(int slot, int r, int c) const {
    return step.state[(slot * step.batch + state_row(r)) * step.channels + c];
  }

  __device__ Size state_row(int r) const { return step.first_sample ? 0 : first_row + r; }

  // A panel of what read(row, channel) gives.
  template <class Read>
  __device__ void load(int panel, const Read& read) const {
#pragma unroll
    for (int r = 0; r < rows; ++r)
      for (int c = thread(); c < step.channels; c += kThreads)
        value(panel + c, r) = exists(r) ? read(r, c) : A(0);
  }

  // Column i of rows [batch][n].
  __device__ void keep(A* to, int n, int i, const A (&values)[rows]) const {
#pragma unroll
    for (int r = 0; r < rows; ++r)
      if (exists(r)) to[(first_row + r) * n + i] = values[r];
  }

  // sums[r] += weights[k] value k of the panel, over the k < n of this lane of `lanes`.
  __device__ void dot(const A* weights, int n, int panel, int lane, int lanes,
                      A (&sums)[rows]) const {
    constexpr int pack = kPack<A>;
    if (!step.packs) {
      for (int k = lane; k < n; k += lanes) {
        const A w = weights[k];
#pragma unroll
        for (int r = 0; r < rows; ++r) sums[r] += w * value(panel + k, r);
      }
      return;
    }
    for (int k = lane * pack; k < n; k += lanes * pack) {
      const Pack<A> w = load_pack(weights + k);
#pragma unroll
      for (int e = 0; e < pack; ++e)
#pragma unroll
        for (int r = 0; r < rows; ++r) sums[r] += w.of[e] * value(panel + k + e, r);
    }
  }

  // Calls body(i, lane, lanes) for i < n, on groups of lanes wide enough that all threads have
  // work. Whole warps call it; i may be n or more: nothing then counts, but shuffles need all.
  template <class Body>
  __device__ void for_outputs(int n, const Body& body) const {
    int lanes = 1;
    while (lanes < kWarp && n * lanes < kThreads) lanes *= 2;
    for (int first = 0; first < n; first += kThreads / lanes)
      body(first + thread() / lanes, thread() % lanes, lanes);
  }

  // use(i, sums) for i < n, with sums[r] the sum over k < m of weights[k * stride + i] times value
  // k of the panel.
  template <class Use>
  __device__ void transposed(int n, int m, const A* weights, int stride, int panel,
                             const Use& use) const {
    int width = 1;
    while (width < kThreads && width < n) width *= 2;
    const int groups = kThreads / width, group = thread() / width;
    for (int first = 0; first < n; first += width) {
      const int i = first + thread() % width;
      A sums[rows] = {};
      if (i < n)
#pragma unroll 4
        for (int k = group; k < m; k += groups) {
          const A w = weights[static_cast<Size>(k) * stride + i];
#pragma unroll
          for (int r = 0; r < rows; ++r) sums[r] += w * value(panel + k, r);
        }
      if (groups > 1) {
#pragma unroll
        for (int r = 0; r < rows; ++r) value(at.partial + thread(), r) = sums[r];
        __syncthreads();
        for (int g = 1; g < groups && group == 0; ++g)
#pragma unroll
          for (int r = 0; r < rows; ++r) sums[r] += value(at.partial + thread() + g * width, r);
        __syncthreads();
      }
      if (group == 0 && i < n) use(i, sums);
    }
  }

  // ---- layers -----------------------------------------------------------------------------------

  __device__ void load_inputs() const {
    load(input(kInput), [&](int r, int c) { return step.y[(first_row + r) * step.channels + c]; });
    const int slot = other() == kNormalised ? layout().memory : 0;
    const Activation activation = other() == kNormalised ? step.activation : Activation::identity;
    load(input(other()), [&](int r, int c) { return activate(activation, state(slot, r, c)); });
  }

  __device__ void hidden_layer(int b) const {
    const Branch& branch = layout().branch[b];
    const int channels = step.channels, depth = branch.sources * channels;
    for_outputs(step.units, [&](int unit, int lane, int lanes) {
      A sums[rows] = {};
      if (unit < step.units)
        for (int i = 0; i < branch.sources; ++i)
          dot(step.params[branch.w1] + static_cast<Size>(unit) * depth + i * channels, channels,
              input(branch.source[i]), lane, lanes, sums);
      A values[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) values[r] = sum_lanes(sums[r], lanes);
      if (unit >= step.units || lane != 0) return;
      const A bias = branch.b1 < 0 ? A(0) : step.params[branch.b1][unit];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        values[r] = activate(Activation::relu, values[r] + bias);
        value(hidden(b) + unit, r) = values[r];
      }
      if (step.hidden != nullptr)
        keep(step.hidden + b * step.batch * step.units, step.units, unit, values);
    });
  }

  // All gates before their activations.
  __device__ void gate_layer() const {
    const int inputs = step.gate_inputs(), outputs = layout().gates * step.channels;
    for_outputs(outputs, [&](int gate, int lane, int lanes) {
      A sums[rows] = {};
      A bias = 0;
      for (int b = 0; b < layout().branches && gate < outputs; ++b) {
        const Branch& branch = layout().branch[b];
        dot(step.params[branch.w2] + static_cast<Size>(gate) * inputs, inputs,
            branch.has_hidden() ? hidden(b) : input(branch.source[0]), lane, lanes, sums);
        bias += step.params[branch.b2][gate];
      }
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const A sum = sum_lanes(sums[r], lanes);
        if (lane == 0 && gate < outputs) value(at.gates + gate, r) = sum + bias;
      }
    });
  }

  // Calls tail(c, r, gate) with the activated gates of every channel and row.
  template <class Tail>
  __device__ void for_tails(const Tail& tail) const {
    for (int i = thread(); i < step.channels * rows; i += kThreads) {
      const int c = i / rows, r = i % rows;
      A gate[kMostGates] = {};
#pragma unroll
      for (int g = 0; g < kMostGates; ++g)
        if (g < layout().gates)
          gate[g] = activate<A>(step.kind.gate_activation[g],
                                value(at.gates + g * step.channels + c, r));
      tail(c, r, gate);
    }
  }

  __device__ void evaluate() const {
    load_inputs();
    __syncthreads();
    for (int b = 0; b < layout().branches && step.units > 0; ++b) hidden_layer(b);
    __syncthreads();
    gate_layer();
    __syncthreads();
  }

  // ---- gradients --------------------------------------------------------------------------------

  // Of a channel of a row: those of the gates before their activations, and of the old memory.
  __device__ void tail_gradients(int c, int r, const A* gate) const {
    const Size row = first_row + r, size = step.batch * step.channels;
    const Size element = row * step.channels + c;
    A grad_gate[kMostGates] = {}, grad_old = 0;
    if (exists(r)) {
      const A old = state(layout().memory, r, c);
      with_tail(step.kind.kind, [&](auto tail) {
        using Tail = decltype(tail);
        A grad = step.grad_out[Tail::layout.memory * size + element];
        if constexpr (Tail::layout.slots > 1) {
          const A squashed = activate(step.kind.squash, Tail::update(gate, old));
          const A back = Tail::output_backward(gate, squashed, step.grad_out[element], grad_gate);
          grad += activation_gradient(step.kind.squash, squashed, back);
        }
        grad_old = Tail::update_backward(gate, old, grad, grad_gate);
      });
    }
    value(at.grad_memory + c, r) = grad_old;
#pragma unroll
    for (int g = 0; g < kMostGates; ++g) {
      if (g >= layout().gates) continue;
      const A grad = activation_gradient(step.kind.gate_activation[g], gate[g], grad_gate[g]);
      const int i = g * step.channels + c;
      value(at.gates + i, r) = exists(r) ? grad : A(0);
      if (exists(r)) step.grad_gates[row * layout().gates * step.channels + i] = grad;
    }
  }

  __device__ void hidden_gradients(int b) const {
    const int units = step.units;
    transposed(units, layout().gates * step.channels, step.params[layout().branch[b].w2], units,
               at.gates, [&](int unit, const A(&sums)[rows]) {
                 A grads[rows];
#pragma unroll
                 for (int r = 0; r < rows; ++r) {
                   const A activated = value(hidden(b) + unit, r);
                   grads[r] = activation_gradient(Activation::relu, activated, sums[r]);
                   value(grad_hidden(b) + unit, r) = grads[r];
                 }
                 keep(step.grad_hidden + b * step.batch * units, units, unit, grads);
               });
  }

  // use(c, sums): gradients of the channels of a source, through the one layer that reads it.
  template <class Use>
  __device__ void input_gradients(int b, int place, const Use& use) const {
    const Branch& branch = layout().branch[b];
    const int channels = step.channels;
    if (!branch.has_hidden())
      return transposed(channels, layout().gates * channels, step.params[branch.w2], channels,
                        at.gates, use);
    transposed(channels, step.units, step.params[branch.w1] + place * channels,
               branch.sources * channels, grad_hidden(b), use);
  }

  __device__ void state_gradients(int c, const A (&sums)[rows]) const {
    A grads[rows], of_memory[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      of_memory[r] = value(at.grad_memory + c, r);
      grads[r] = sums[r];
      if (other() == kNormalised) {
        const A normalised = value(input(kNormalised) + c, r);
        grads[r] = activation_gradient(step.activation, normalised, grads[r]);
      }
      if (layout().memory == 0) grads[r] += of_memory[r];
    }
    keep(step.grad_state, step.channels, c, grads);
    if (layout().memory > 0)
      keep(step.grad_state + layout().memory * step.batch * step.channels, step.channels, c,
           of_memory);
  }

  __device__ void keep_normalised() const {
    for (int c = thread(); c < step.channels && other() == kNormalised; c += kThreads) {
      A values[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) values[r] = value(input(kNormalised) + c, r);
      keep(step.normalised, step.channels, c, values);
    }
  }
};

template <class A, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Step<A> step) {
  DLA_DYNAMIC_SHARED(A, shared);
  const Tile<A, rows> tile(step, shared, false);
  tile.evaluate();
  const Size size = step.batch * step.channels;
  tile.for_tails([&](int c, int r, const A* gate) {
    if (!tile.exists(r)) return;
    const Size element = (tile.first_row + r) * step.channels + c;
    with_tail(step.kind.kind, [&](auto tail) {
      using Tail = decltype(tail);
      const A memory = Tail::update(gate, tile.state(Tail::layout.memory, r, c));
      step.out[Tail::layout.memory * size + element] = memory;
      if constexpr (Tail::layout.slots > 1)
        step.out[element] = Tail::output(gate, activate(step.kind.squash, memory));
    });
  });
}

template <class A, int rows>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Step<A> step) {
  DLA_DYNAMIC_SHARED(A, shared);
  const Tile<A, rows> tile(step, shared, true);
  tile.evaluate();
  tile.keep_normalised();
  tile.for_tails([&](int c, int r, const A* gate) { tile.tail_gradients(c, r, gate); });
  __syncthreads();
  if (step.units > 0) {
    for (int b = 0; b < tile.layout().branches; ++b) tile.hidden_gradients(b);
    __syncthreads();
  }
  const bool joined = tile.layout().branches == 1;  // (the other source, y) side by side
  tile.input_gradients(0, joined ? 1 : 0, [&](int c, const A(&sums)[rows]) {
    tile.keep(step.grad_y, step.channels, c, sums);
  });
  tile.input_gradients(joined ? 0 : 1, 0,
                       [&](int c, const A(&sums)[rows]) { tile.state_gradients(c, sums); });
}

// ---- gradients of the weights -------------------------------------------------------------------

constexpr int kMostJobs = kMaxCellParams;
constexpr int kTogether = 4;  // rows of a matrix that a thread takes

// One row of n values for each sample; stride 0: one for all. No data: 1, the only value.
template <class A>
struct Rows {
  const A* data;
  Size stride;
};

// to[m][n] = [to[m][n] +] sum over the batch of left[m] right[n].
template <class A>
struct Job {
  const A* left;  // [batch][m]
  Rows<A> right;
  A* to;
  int m, n;
  Size to_stride;
  int width;  // threads side by side along n
  unsigned first_block;
};

template <class A>
struct Jobs {
  int count;
  bool add_up;  // to what is there
  Size batch, blocks;
  Job<A> of[kMostJobs];

  void add(const A* left, int m, const Rows<A>& right, int n, A* to, Size to_stride) {
    Job<A>& job = of[count++];
    job = {left, right, to, m, n, to_stride, 1, static_cast<unsigned>(blocks)};
    while (job.width < kThreads && job.width < n) job.width *= 2;
    const Size down = kThreads / job.width * kTogether;
    blocks += (m + down - 1) / down * ((n + job.width - 1) / job.width);
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads) weights_kernel(const __grid_constant__ Jobs<A> jobs) {
  int number = 0;
  while (number + 1 < jobs.count && blockIdx.x >= jobs.of[number + 1].first_block) ++number;
  const Job<A>& job = jobs.of[number];
  const int thread = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x - job.first_block);
  const int across = (job.n + job.width - 1) / job.width;
  const int column = block % across * job.width + thread % job.width;
  const int first = (block / across * (kThreads / job.width) + thread / job.width) * kTogether;
  if (column >= job.n) return;
  A sums[kTogether] = {};
#pragma unroll 4
  for (Size row = 0; row < jobs.batch; ++row) {
    const A right =
        job.right.data == nullptr ? A(1) : job.right.data[row * job.right.stride + column];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (first + j < job.m) sums[j] += job.left[row * job.m + first + j] * right;
  }
#pragma unroll
  for (int j = 0; j < kTogether; ++j)
    if (first + j < job.m) {
      A& to = job.to[(first + j) * job.to_stride + column];
      to = jobs.add_up ? to + sums[j] : sums[j];
    }
}

template <class A>
Jobs<A> weight_jobs(const Step<A>& step, const std::vector<void*>& grads, bool add_up) {
  const CellLayout& layout = step.kind.layout;
  const int gates = layout.gates * step.channels;
  const auto grad = [&](int i) { return static_cast<A*>(grads[static_cast<std::size_t>(i)]); };
  const auto rows_of = [&](Source source) -> Rows<A> {
    if (source == kInput) return {step.y, step.channels};
    if (source == kNormalised) return {step.normalised, step.channels};
    return {step.state, step.first_sample ? 0 : step.channels};
  };
  const Rows<A> one{nullptr, 0};
  Jobs<A> jobs = {};
  jobs.add_up = add_up;
  jobs.batch = step.batch;
  for (int b = 0; b < layout.branches; ++b) {
    const Branch& branch = layout.branch[b];
    const A* grad_hidden = step.grad_hidden + b * step.batch * step.units;
    const Size depth = static_cast<Size>(branch.sources) * step.channels;
    for (int i = 0; i < branch.sources && branch.has_hidden(); ++i)
      jobs.add(grad_hidden, step.units, rows_of(branch.source[i]), step.channels,
               grad(branch.w1) + i * step.channels, depth);
    if (branch.b1 >= 0) jobs.add(grad_hidden, step.units, one, 1, grad(branch.b1), 1);
    const int width = branch.has_hidden() ? step.units : step.channels;
    const Rows<A> inputs = branch.has_hidden()
                               ? Rows<A>{step.hidden + b * step.batch * step.units, step.units}
                               : rows_of(branch.source[0]);
    jobs.add(step.grad_gates, gates, inputs, width, grad(branch.w2), width);
    jobs.add(step.grad_gates, gates, one, 1, grad(branch.b2), 1);
  }
  return jobs;
}

// ---- host ---------------------------------------------------------------------------------------

template <class A, class Args>
Step<A> step_of(const Args& args) {
  Step<A> step = {};
  step.kind = kind_of(args.kind);
  const CellLayout& layout = step.kind.layout;
  if (static_cast<int>(args.params.size()) != layout.params)
    throw std::invalid_argument("cell: wrong number of parameters for this kind");
  step.activation = args.activation;
  step.y = static_cast<const A*>(args.y);
  step.state = static_cast<const A*>(args.state);
  step.batch = args.batch;
  step.first_sample = args.first_sample;
  step.channels = static_cast<int>(args.channels);
  step.units = layout.has_hidden() ? static_cast<int>(args.hidden) : 0;
  step.packs = step.channels % kPack<A> == 0 && step.units % kPack<A> == 0;
  for (int i = 0; i < layout.params; ++i) {
    step.params[i] = static_cast<const A*>(args.params[static_cast<std::size_t>(i)]);
    step.packs = step.packs && reinterpret_cast<std::uintptr_t>(step.params[i]) % 16 == 0;
  }
  return step;
}

template <class A>
using Kernel = void (*)(Step<A>);

// As many rows to a block as fit its shared memory.
template <class A>
void launch_rows(const Call& call, const Step<A>& step, bool backward, Kernel<A> many,
                 Kernel<A> one) {
  const int values = Panels(step.kind.layout, step.channels, step.units, backward).size;
  const auto bytes = [](int elements) { return static_cast<std::size_t>(elements) * sizeof(A); };
  const std::size_t of_many = bytes(shared_elements<kMostRows<A>>(values)), of_one = bytes(values);
  const std::size_t most = most_shared_bytes(call);
  if (of_one > most)
    throw std::runtime_error(call.text() + ": too many channels for the shared memory of this GPU; "
                             "dla_kernels.use_backend('triton') or 'reference' serves them");
  if (step.batch > 1 && of_many <= most)
    launch(call, many, {(step.batch + kMostRows<A> - 1) / kMostRows<A>, kThreads, of_many}, step);
  else
    launch(call, one, {step.batch, kThreads, of_one}, step);
}

template <class Body>
void with_compute_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    default: throw std::invalid_argument("cell: dtype must be 0 (f32) or 1 (f64)");
  }
}

}  // namespace cell

void cell_forward(const CellForward& args) {
  using namespace cell;
  with_compute_type(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    Step<A> step = step_of<A>(args);
    step.out = static_cast<A*>(args.out);
    const Call call{"cell", args.batch, args.channels, 1, args.stream};
    launch_rows(call, step, false, forward_kernel<A, kMostRows<A>>, forward_kernel<A, 1>);
  });
}

void cell_backward(const CellBackward& args) {
  using namespace cell;
  with_compute_type(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    Step<A> step = step_of<A>(args);
    const CellLayout& layout = step.kind.layout;
    step.grad_out = static_cast<const A*>(args.grad_out);
    step.grad_y = static_cast<A*>(args.grad_y);
    step.grad_state = static_cast<A*>(args.grad_state);
    step.grad_gates = static_cast<A*>(args.scratch);
    step.normalised = step.grad_gates + step.batch * layout.gates * step.channels;
    step.hidden = step.normalised + step.batch * step.channels;
    step.grad_hidden = step.hidden + step.batch * layout.branches * step.units;
    const Call call{"cell_backward", args.batch, args.channels, 1, args.stream};
    launch_rows(call, step, true, backward_kernel<A, kMostRows<A>>, backward_kernel<A, 1>);
    const Jobs<A> jobs = weight_jobs(step, args.grad_params, args.add_params);
    launch(call, weights_kernel<A>, {jobs.blocks, kThreads}, jobs);
  });
}

}  // namespace dla::cuda
