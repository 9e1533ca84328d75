// The recurrent cells, for cpu.cpp and for ops that contain a cell: two small products and a
// pointwise tail, for every kind of cell. layout.h says what a kind is, panel.h how rows are laid
// out for the products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "ops/cell/layout.h"
#include "ops/cell/op.h"
#include "ops/cell/panel.h"

namespace dla::DLA_ISA {

template <class A>
struct CellWeights {
  CellKind kind;
  Activation activation;
  std::int64_t channels, hidden;
  const A* params[kMaxCellParams];  // in the order of the kind, dense
};

// Rows [r0, r1) of one cell step on y [batch, channels] and state [slots, batch, channels].
// `first_sample`: every row reads row 0 of the state. `out` is the new state [slots, batch,
// channels], or [batch, channels] with `output_only` (the cell's output, slot 0; the rest of the
// new state is not written). `out` may not overlap the inputs. No barriers: a caller divides the
// rows among its threads as it likes, the results are the same to the bit. Rows come in tiles of
// kLanes<A>, so a division at multiples of it wastes nothing.
template <class A>
void cell_forward_rows(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                       std::int64_t batch, std::int64_t r0, std::int64_t r1, A* out,
                       bool output_only, Scratch& scratch);

// Gradients of one cell step from that of the new state, grad_out [slots, batch, channels], or of
// the output alone, [batch, channels], with `output_only`. Adds to grad_y [batch, channels],
// grad_state [slots, batch, channels] (to its row 0 with `first_sample`) and grad_params; a null
// pointer skips that gradient. Nothing saved by the forward is needed. Opens its own parallel
// regions of `threads` threads; the results do not depend on their number.
template <class A>
void cell_backward(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                   std::int64_t batch, const A* grad_out, bool output_only, A* grad_y,
                   A* grad_state, A* const grad_params[kMaxCellParams], int threads);

namespace cell_detail {

constexpr Size kDepth = 128;      // inputs packed at a time: their panel stays in the L1 cache
constexpr Size kChannels = 32;    // channels that the tail works on at a time, and blocks of
                                  // weight gradients
constexpr Size kSingleRows = 2;   // batches up to this size go row by row
constexpr Size kChunk = 64;       // rows that a weight gradient takes in one product

// The inputs of a step and the addresses in them.
template <class A>
struct Step {
  const CellWeights<A>& cell;
  const CellLayout& layout;
  const A* y;
  const A* state;
  bool first_sample;
  Size batch;

  Size channels() const { return cell.channels; }
  Size hidden() const { return cell.hidden; }
  const A* param(int index) const { return cell.params[index]; }

  // Rows [r, r + count) of y or of a slot of the state.
  Rows<const A> rows(int slot, Size r, Size count) const {
    if (slot == kInput) return {y + r * channels(), channels(), count};
    const A* plane = state + slot * batch * channels();
    if (first_sample) return {plane, 0, count};
    return {plane + r * channels(), channels(), count};
  }

  // The part of the hidden weights that reads source `index` from channel c on, and the row stride.
  const A* hidden_weights(const Branch& branch, int index, Size c) const {
    return param(branch.w1) + index * channels() + c;
  }
  Size hidden_stride(const Branch& branch) const { return branch.sources * channels(); }
};

// hidden = ReLU(W1 sources + b1) of a branch; `inputs` is working space for kDepth values a row.
template <class Form, class A>
void hidden_layer(const Step<A>& step, const Branch& branch, Size r, Size count, A* inputs,
                  A* hidden) {
  const A* bias = branch.b1 < 0 ? nullptr : step.param(branch.b1);
  Form::fill(step.hidden(), [=](Size j) { return bias == nullptr ? A(0) : bias[j]; }, hidden);
  for (int i = 0; i < branch.sources; ++i) {
    const Source& source = branch.source[i];
    for (Size c = 0; c < step.channels(); c += kDepth) {
      const Size n = std::min(kDepth, step.channels() - c);
      Form::pack(step.rows(source.slot, r, count).from(c), n, inputs);
      if (source.activated) activate(step.cell.activation, inputs, Form::size(n));
      Form::multiply(step.hidden(), n, step.hidden_weights(branch, i, c),
                     step.hidden_stride(branch), inputs, hidden);
    }
  }
  activate(Activation::relu, hidden, Form::size(step.hidden()));
}

// Gates of channels [c, c + n), gate g at gates + g Form::size(kChannels).
template <class Form, class A>
void gate_layer(const Step<A>& step, const A* const* hidden, Size c, Size n, A* gates) {
  for (int g = 0; g < step.layout.gates; ++g) {
    const Size first = g * step.channels() + c;
    A* out = gates + g * Form::size(kChannels);
    const A* bias = step.param(step.layout.branch[0].b2) + first;
    const A* other = nullptr;
    if (step.layout.branches == 2) other = step.param(step.layout.branch[1].b2) + first;
    Form::fill(n, [=](Size i) { return other == nullptr ? bias[i] : bias[i] + other[i]; }, out);
    for (int b = 0; b < step.layout.branches; ++b)
      Form::multiply(n, step.hidden(), step.param(step.layout.branch[b].w2) + first * step.hidden(),
                     step.hidden(), hidden[b], out);
  }
}

// Working space of a tail for kChannels channels.
template <class Tail, class Form, class A>
struct TailBlock {
  static constexpr Size size = Form::size(kChannels);
  static constexpr Size total = (Tail::gates + 2 + Tail::slots) * size;

  A* gates;     // activated
  A* old;       // memory
  A* squashed;  // new memory, if the output is made of it
  A* state;     // the new state, slot after slot

  explicit TailBlock(A* work)
      : gates(work),
        old(gates + Tail::gates * size),
        squashed(old + size),
        state(squashed + size) {}

  void load_gates(Size at, Vec<A>* gate) const {
    for (int g = 0; g < Tail::gates; ++g) gate[g] = load(gates + g * size + at);
  }
};

// The tail on channels [c, c + n): fills the block.
template <class Tail, class Form, class A>
void forward_block(const Step<A>& step, const A* const* hidden, Size r, Size count, Size c, Size n,
                   const TailBlock<Tail, Form, A>& block) {
  const Size size = Form::size(n);
  gate_layer<Form>(step, hidden, c, n, block.gates);
  for (int g = 0; g < Tail::gates; ++g)
    activate(Tail::gate_activation[g], block.gates + g * block.size, size);
  Form::pack(step.rows(Tail::memory, r, count).from(c), n, block.old);
  A* memory = block.state + Tail::memory * block.size;
  Vec<A> gate[Tail::gates];
  for (Size i = 0; i < size; i += kLanes<A>) {
    block.load_gates(i, gate);
    store(memory + i, Tail::template update<A>(gate, load(block.old + i)));
  }
  if constexpr (Tail::slots > 1) {
    std::copy_n(memory, size, block.squashed);
    activate(Tail::squash, block.squashed, size);
    for (Size i = 0; i < size; i += kLanes<A>) {
      block.load_gates(i, gate);
      store(block.state + i, Tail::template output<A>(gate, load(block.squashed + i)));
    }
  }
}

template <class Tail, class Form, class A>
Size forward_work(const Step<A>& step) {
  return Form::size(kDepth) + TailBlock<Tail, Form, A>::total +
         step.layout.branches * Form::size(step.hidden());
}

// One tile: rows [r, r + count), at most Form's width.
template <class Tail, class Form, class A>
void forward_tile(const Step<A>& step, Size r, Size count, A* out, bool output_only, A* work) {
  using Block = TailBlock<Tail, Form, A>;
  A* inputs = work;
  const Block block(inputs + Form::size(kDepth));
  A* hidden[2];
  for (int b = 0; b < step.layout.branches; ++b) {
    hidden[b] = inputs + Form::size(kDepth) + Block::total + b * Form::size(step.hidden());
    hidden_layer<Form>(step, step.layout.branch[b], r, count, inputs, hidden[b]);
  }
  for (Size c = 0; c < step.channels(); c += kChannels) {
    const Size n = std::min(kChannels, step.channels() - c);
    forward_block(step, hidden, r, count, c, n, block);
    for (int slot = 0; slot < (output_only ? 1 : Tail::slots); ++slot) {
      A* to = out + (slot * step.batch + r) * step.channels() + c;
      Form::template unpack<false>(block.state + slot * Block::size, n,
                                   {to, step.channels(), count});
    }
  }
}

template <class Tail, class Form, class A>
void forward_tiles(const Step<A>& step, Size& r, Size end, Size rows, A* out, bool output_only,
                   Scratch& scratch) {
  A* work = scratch.reserve<A>(forward_work<Tail, Form>(step));
  for (; r < end && end - r >= rows; r += Form::width)
    forward_tile<Tail, Form>(step, r, std::min(Form::width, end - r), out, output_only, work);
}

// A step's gradients in two passes: over rows (everything but the parameters), then over blocks of
// the parameters. What the second needs of the first is kept for the whole batch, in chunks of
// rows; the gradients as columns, which multiply_add broadcasts, the layers' inputs as rows.
template <class Tail, class A>
class Backward {
 public:
  Backward(const Step<A>& step, const A* grad_out, bool output_only, A* grad_y, A* grad_state,
           A* const* grad_params, Scratch& scratch)
      : step_(step),
        grad_out_(grad_out),
        output_only_(output_only),
        grad_y_(grad_y),
        grad_state_(grad_state),
        grad_params_(grad_params),
        padded_hidden_(whole_vectors<A>(step.hidden())),
        chunk_rows_(std::min(kChunk, 2 * whole_vectors<A>((step.batch + 1) / 2))) {
    const Size chunks = (step.batch + chunk_rows_ - 1) / chunk_rows_;
    const bool sums_rows = step.first_sample && grad_state != nullptr;
    const Size state_size = sums_rows ? Tail::slots * step.batch * step.channels() : 0;
    const Size gates = chunks * chunk_rows_ * Tail::gates * step.channels();
    const Size hidden_grad = chunks * chunk_rows_ * step.hidden();
    const Size hidden = step.batch * padded_hidden_;
    const Size branches = step.layout.branches;
    const Size activated = step.batch * step.channels();
    A* p = scratch.reserve<A>(gates + branches * (hidden_grad + hidden) + activated + state_size);
    grad_gates_ = p;
    p += gates;
    for (int b = 0; b < branches; ++b) {
      grad_hidden_[b] = p;
      hidden_[b] = p + hidden_grad;
      p += hidden_grad + hidden;
    }
    activated_ = p;
    if (sums_rows) {
      row_grad_state_ = activated_ + activated;
      std::fill_n(row_grad_state_, state_size, A(0));
    } else {
      row_grad_state_ = grad_state;
    }
  }

  void run(int threads) {
    constexpr Size lanes = kLanes<A>;
    // Two tiles at a time use each weight twice, if that leaves work for all threads.
    if (step_.batch > lanes && step_.batch >= 2 * lanes * threads) {
      run_rows<2>(threads);
    } else {
      run_rows<1>(threads);
    }
    run_params(threads);
  }

 private:
  template <int tiles>
  void run_rows(int threads) {
    using Form = Lanes<A, tiles>;
    const Size count = (step_.batch + Form::width - 1) / Form::width;
    parallel_for(threads, count, [&](Size tile) {
      thread_local Scratch scratch;
      const Size r = tile * Form::width;
      row_tile<Form>(r, std::min(Form::width, step_.batch - r), scratch);
    });
  }

  // Where the gradients of gate or hidden unit 0 lie, one column per row of the batch.
  A* grad_gates(Size r) const {
    return grad_gates_ + r / kChunk * chunk_rows_ * Tail::gates * step_.channels() + r % kChunk;
  }
  A* grad_hidden(int b, Size r) const {
    return grad_hidden_[b] + r / kChunk * chunk_rows_ * step_.hidden() + r % kChunk;
  }

  Rows<A> grad_rows(int slot, Size r, Size count) const {
    const Size channels = step_.channels();
    if (slot == kInput) return {grad_y_ ? grad_y_ + r * channels : nullptr, channels, count};
    if (row_grad_state_ == nullptr) return {nullptr, channels, count};
    return {row_grad_state_ + (slot * step_.batch + r) * channels, channels, count};
  }

  // What a layer's weight gradient multiplies: the source as the layer saw it.
  Rows<const A> layer_input(const Source& source, Size r, Size count) const {
    if (source.activated)
      return {activated_ + r * step_.channels(), step_.channels(), count};
    return step_.rows(source.slot, r, count);
  }

  template <class Form>
  void row_tile(Size r, Size count, Scratch& scratch) {
    const int branches = step_.layout.branches;
    const Size hidden_size = Form::size(padded_hidden_);
    A* inputs = scratch.reserve<A>(Form::size(kDepth) + branches * hidden_size +
                                   TailBlock<Tail, Form, A>::total +
                                   (Tail::slots + 1) * Form::size(kChannels));
    A* work = inputs + Form::size(kDepth);
    A* hidden[2];
    for (int b = 0; b < branches; ++b, work += hidden_size) {
      hidden[b] = work;
      hidden_layer<Form>(step_, step_.layout.branch[b], r, count, inputs, hidden[b]);
      std::fill(hidden[b] + Form::size(step_.hidden()), hidden[b] + hidden_size, A(0));
      Form::template unpack<false>(hidden[b], padded_hidden_,
                                   {hidden_[b] + r * padded_hidden_, padded_hidden_, count});
      for (Size j = 0; j < step_.hidden(); ++j)
        std::fill_n(grad_hidden(b, r) + j * chunk_rows_, Form::width, A(0));
    }
    for (Size c = 0; c < step_.channels(); c += kChannels) {
      const Size n = std::min(kChannels, step_.channels() - c);
      tail_block<Form>(r, count, c, n, hidden, work);
      hidden_gradients<Form>(r, c, n);
    }
    for (int b = 0; b < branches; ++b) {
      relu_backward<Form>(hidden[b], grad_hidden(b, r));
      for (int i = 0; i < step_.layout.branch[b].sources; ++i)
        source_gradients<Form>(b, i, r, count, work);
    }
  }

  // Gradients of the gates of channels [c, c + n), kept, and of the memory.
  template <class Form>
  void tail_block(Size r, Size count, Size c, Size n, const A* const* hidden, A* work) {
    using Block = TailBlock<Tail, Form, A>;
    const Size channels = step_.channels();
    const Block block(work);
    A* grad_old = work + Block::total;
    A* grad_state = grad_old + Block::size;
    forward_block(step_, hidden, r, count, c, n, block);
    const int slots = output_only_ ? 1 : Tail::slots;
    for (int slot = 0; slot < slots; ++slot) {
      const A* from = grad_out_ + (slot * step_.batch + r) * channels + c;
      Form::pack({from, channels, count}, n, grad_state + slot * Block::size);
    }
    std::fill(grad_state + slots * Block::size, grad_state + Tail::slots * Block::size, A(0));
    A* to_gates = grad_gates(r) + c * chunk_rows_;
    for (Size i = 0; i < n; ++i) {
      for (Size lane = 0; lane < Form::width; lane += kLanes<A>) {
        const Size at = i * Form::width + lane;
        Vec<A> gate[Tail::gates], grad_gate[Tail::gates];
        block.load_gates(at, gate);
        const Vec<A> grad = memory_gradient(block, gate, grad_state, at, grad_gate);
        store(grad_old + at,
              Tail::template update_backward<A>(gate, load(block.old + at), grad, grad_gate));
        for (int g = 0; g < Tail::gates; ++g)
          store(to_gates + (g * channels + i) * chunk_rows_ + lane,
                activation_gradient<A>(Tail::gate_activation[g], gate[g], grad_gate[g]));
      }
    }
    const Rows<A> to = grad_rows(Tail::memory, r, count);
    if (to.data != nullptr) Form::template unpack<true>(grad_old, n, to.from(c));
  }

  // Gradient of the new memory: its own, and through the output where that is another slot.
  template <class Block>
  static Vec<A> memory_gradient(const Block& block, const Vec<A>* gate, const A* grad_state,
                                Size at, Vec<A>* grad_gate) {
    const Vec<A> own = load(grad_state + Tail::memory * Block::size + at);
    if constexpr (Tail::slots == 1) {
      return own;
    } else {
      const Vec<A> squashed = load(block.squashed + at);
      const Vec<A> grad =
          Tail::template output_backward<A>(gate, squashed, load(grad_state + at), grad_gate);
      return own + activation_gradient<A>(Tail::squash, squashed, grad);
    }
  }

  // Adds the part of the hidden units' gradients that comes through the gates of [c, c + n).
  template <class Form>
  void hidden_gradients(Size r, Size c, Size n) {
    for (int b = 0; b < step_.layout.branches; ++b) {
      for (int g = 0; g < Tail::gates; ++g) {
        const Size first = g * step_.channels() + c;
        const A* weights = step_.param(step_.layout.branch[b].w2) + first * step_.hidden();
        multiply_add<A>(step_.hidden(), Form::width, n, {weights, 1, step_.hidden()},
                        grad_gates(r) + first * chunk_rows_, chunk_rows_, grad_hidden(b, r),
                        chunk_rows_);
      }
    }
  }

  template <class Form>
  void relu_backward(const A* hidden, A* grad) {
    for (Size j = 0; j < step_.hidden(); ++j)
      activate_backward(Activation::relu, hidden + j * Form::width, grad + j * chunk_rows_,
                        Form::width);
  }

  template <class Form>
  void source_gradients(int b, int index, Size r, Size count, A* work) {
    const Branch& branch = step_.layout.branch[b];
    const Source& source = branch.source[index];
    const Rows<A> to = grad_rows(source.slot, r, count);
    A* input = work;
    A* grad = input + Form::size(kChannels);
    for (Size c = 0; c < step_.channels(); c += kChannels) {
      const Size n = std::min(kChannels, step_.channels() - c);
      if (source.activated) {
        Form::pack(step_.rows(source.slot, r, count).from(c), n, input);
        activate(step_.cell.activation, input, Form::size(n));
        A* kept = activated_ + r * step_.channels() + c;
        Form::template unpack<false>(input, n, {kept, step_.channels(), count});
      }
      if (to.data == nullptr) continue;
      std::fill_n(grad, Form::size(n), A(0));
      multiply_add<A>(n, Form::width, step_.hidden(),
                      {step_.hidden_weights(branch, index, c), 1, step_.hidden_stride(branch)},
                      grad_hidden(b, r), chunk_rows_, grad, Form::width);
      if (source.activated)
        activate_backward(step_.cell.activation, input, grad, Form::size(n));
      Form::template unpack<true>(grad, n, to.from(c));
    }
  }

  // Blocks of the parameters cost about the same each: kChannels gates by all hidden units, or all
  // hidden units by kChannels inputs.
  void run_params(int threads) {
    const Size blocks = (step_.channels() + kChannels - 1) / kChannels;
    const Size gate_tasks = step_.layout.branches * Tail::gates * blocks;
    Size sources = 0;
    for (int b = 0; b < step_.layout.branches; ++b) sources += step_.layout.branch[b].sources;
    const bool sums_rows = row_grad_state_ != grad_state_;
    const Size tasks = gate_tasks + (sources + (sums_rows ? Tail::slots : 0)) * blocks;
    parallel_for(threads, tasks, [&](Size task) {
      const Size c = task % blocks * kChannels;
      Size index = task / blocks;
      if (index < step_.layout.branches * Tail::gates) {
        gate_params(static_cast<int>(index / Tail::gates), index % Tail::gates, c);
        return;
      }
      index -= step_.layout.branches * Tail::gates;
      for (int b = 0; b < step_.layout.branches; ++b) {
        if (index < step_.layout.branch[b].sources) {
          hidden_params(b, static_cast<int>(index), c);
          return;
        }
        index -= step_.layout.branch[b].sources;
      }
      sum_rows(index, c);
    });
  }

  // Calls body(first row, count) for every chunk of the batch.
  template <class Body>
  void for_chunks(Body&& body) {
    for (Size r = 0; r < step_.batch; r += kChunk) body(r, std::min(kChunk, step_.batch - r));
  }

  // W2 and b2 of a branch, rows of gate g and channels from c on.
  void gate_params(int b, Size g, Size c) {
    const Branch& branch = step_.layout.branch[b];
    const Size n = std::min(kChannels, step_.channels() - c);
    const Size first = g * step_.channels() + c;
    A bias[kChannels] = {};
    for_chunks([&](Size r, Size count) {
      const A* grad = grad_gates(r) + first * chunk_rows_;
      if (A* weights = grad_params_[branch.w2])
        multiply_add<A>(n, step_.hidden(), count, {grad, chunk_rows_, 1},
                        hidden_[b] + r * padded_hidden_, padded_hidden_,
                        weights + first * step_.hidden(), step_.hidden());
      if (b == 0) add_row_sums(n, count, grad, bias);
    });
    if (b > 0) return;
    // The gates are a sum over the branches: all their biases have one gradient.
    for (int other = 0; other < step_.layout.branches; ++other)
      if (A* to = grad_params_[step_.layout.branch[other].b2])
        for (Size i = 0; i < n; ++i) to[first + i] += bias[i];
  }

  // W1 of a branch, columns from c on of source `index`, and b1 with the first of these blocks.
  void hidden_params(int b, int index, Size c) {
    const Branch& branch = step_.layout.branch[b];
    const Size n = std::min(kChannels, step_.channels() - c);
    const bool with_bias = index == 0 && c == 0 && branch.b1 >= 0;
    for_chunks([&](Size r, Size count) {
      const A* grad = grad_hidden(b, r);
      const Rows<const A> input = layer_input(branch.source[index], r, count).from(c);
      if (A* weights = grad_params_[branch.w1])
        multiply_add<A>(step_.hidden(), n, count, {grad, chunk_rows_, 1}, input.data, input.stride,
                        weights + index * step_.channels() + c, step_.hidden_stride(branch));
      if (A* bias = with_bias ? grad_params_[branch.b1] : nullptr)
        add_row_sums(step_.hidden(), count, grad, bias);
    });
  }

  void add_row_sums(Size n, Size count, const A* grad, A* out) {
    A ones[kChunk];
    std::fill_n(ones, count, A(1));
    multiply_add_vector<A>(n, count, grad, chunk_rows_, ones, out);
  }

  // first_sample: what all rows contribute to row 0 of a slot.
  void sum_rows(Size slot, Size c) {
    const Size n = std::min(kChannels, step_.channels() - c);
    const A* from = row_grad_state_ + slot * step_.batch * step_.channels() + c;
    A* to = grad_state_ + slot * step_.batch * step_.channels() + c;
    for (Size r = 0; r < step_.batch; ++r)
      for (Size i = 0; i < n; ++i) to[i] += from[r * step_.channels() + i];
  }

  const Step<A>& step_;
  const A* grad_out_;
  bool output_only_;
  A* grad_y_;
  A* grad_state_;
  A* const* grad_params_;
  Size padded_hidden_;
  Size chunk_rows_;
  A* grad_gates_;       // [chunk][gates * channels][row in chunk]
  A* grad_hidden_[2];   // [chunk][hidden][row in chunk]
  A* hidden_[2];        // [batch][padded hidden]
  A* activated_;        // [batch][channels]: the activated source, if the kind has one
  A* row_grad_state_;   // grad_state_, or with first_sample the rows to be summed
};

}  // namespace cell_detail

template <class A>
void cell_forward_rows(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                       std::int64_t batch, std::int64_t r0, std::int64_t r1, A* out,
                       bool output_only, Scratch& scratch) {
  using namespace cell_detail;
  with_tail(cell.kind, [&](auto tail) {
    using Tail = decltype(tail);
    const Step<A> step{cell, Tail::layout, y, state, first_sample, batch};
    Size r = r0;
    // The choice may depend on the batch, not on the division of its rows: their sums differ.
    if (batch <= kSingleRows)
      return forward_tiles<Tail, Single<A>>(step, r, r1, 1, out, output_only, scratch);
    forward_tiles<Tail, Lanes<A, 2>>(step, r, r1, kLanes<A> + 1, out, output_only, scratch);
    forward_tiles<Tail, Lanes<A, 1>>(step, r, r1, 1, out, output_only, scratch);
  });
}

template <class A>
void cell_backward(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                   std::int64_t batch, const A* grad_out, bool output_only, A* grad_y,
                   A* grad_state, A* const grad_params[kMaxCellParams], int threads) {
  using namespace cell_detail;
  with_tail(cell.kind, [&](auto tail) {
    using Tail = decltype(tail);
    const Step<A> step{cell, Tail::layout, y, state, first_sample, batch};
    thread_local Scratch scratch;
    Backward<Tail, A>(step, grad_out, output_only, grad_y, grad_state, grad_params, scratch)
        .run(threads);
  });
}

}  // namespace dla::DLA_ISA
