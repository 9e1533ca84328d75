// The gradients of a cell step: in stages that go on where the evaluation ends, the tail and the
// gates, the hidden layers, the inputs; then all parameters, which are sums over the rows.
#pragma once

#include "ops/cell/evaluation.h"

namespace dla::DLA_ISA::cell_detail {

// Where the results go, see cell_backward().
template <class A>
struct CellGradients {
  A *y, *state;
  A* const* params;
  bool fresh_params;
};

template <class A>
class Gradients {
 public:
  Gradients(const Evaluation<A>& cell, const A* grad_out, bool output_only,
            const CellGradients<A>& to, Workspace& workspace)
      : cell_(cell),
        grad_out_(grad_out),
        given_slots_(output_only ? 1 : cell.layout.slots),
        to_(to),
        gates_(cell.panels(workspace.grad_gates, cell.layout.gates * cell.channels())),
        memory_(cell.panels(workspace.grad_memory, cell.channels())) {
    if (!cell.layout.has_hidden()) return;
    for (int b = 0; b < cell.layout.branches; ++b)
      hidden_[b] = cell.panels(workspace.grad_hidden[b], hidden());
  }

  template <class Tail>
  void run(int threads) const {
    cell_.run(threads,
              Stage{channels(), kChannels,
                    [this](Size group, Size c, Size n) { tail_gradients<Tail>(group, c, n); }},
              stage_of_sets(layout().branches, hidden(), kUnits,
                            [this](int b, Size group, Size first, Size n) {
                              hidden_gradients(b, group, first, n);
                            }),
              stage_of_sets(1 + layout().slots, channels(), kChannels,
                            [this](int source, Size group, Size c, Size n) {
                              if (!sums_rows(source)) input_gradients(source, group, c, n);
                            }));
    parallel_loops(threads, hidden_weights_loop(), gate_weights_loop(), first_row_loop());
  }

 private:
  const CellLayout& layout() const { return cell_.layout; }
  Size channels() const { return cell_.channels(); }
  Size hidden() const { return cell_.hidden_units(); }
  Size width() const { return cell_.groups.width; }
  Size all_gates() const { return layout().gates * channels(); }

  // Gradients of the gates of channels [c, c + n) before their activations, and of the memory.
  template <class Tail>
  void tail_gradients(Size group, Size c, Size n) const {
    thread_local Scratch scratch;
    const TailBlock<Tail, A> block(scratch, width());
    forward_block(cell_, group, c, n, block);
    pack_grad_out(group, c, n, block.grad_state, block.stride);
    const A* old = cell_.input(slot_source(Tail::layout.memory), group, c);
    A *to_memory = memory_.of(group, c), *to_gates = gates_.of(group, c);
    for (Size i = 0; i < cell_.size(n); i += kLanes<A>) {
      Vec<A> gate[Tail::gates], grad_gate[Tail::gates];
      block.load_gates(i, gate);
      const Vec<A> grad = memory_gradient(block, gate, i, grad_gate);
      store(to_memory + i, Tail::update_backward(gate, load(old + i), grad, grad_gate));
      for (int g = 0; g < Tail::gates; ++g)
        store(to_gates + g * cell_.size(channels()) + i,
              activation_gradient<A>(Tail::gate_activation[g], gate[g], grad_gate[g]));
    }
  }

  void pack_grad_out(Size group, Size c, Size n, A* panel, Size stride) const {
    for (int slot = 0; slot < layout().slots; ++slot, panel += stride) {
      if (slot < given_slots_) {
        const Size row = slot * cell_.in.batch + cell_.groups.first_row(group);
        pack<A>({grad_out_ + row * channels() + c, channels(), cell_.groups.rows_in(group)}, n,
                width(), panel);
      } else {
        std::fill_n(panel, cell_.size(n), A(0));
      }
    }
  }

  // Gradient of the new memory: its own, and through the output where that is another slot.
  template <class Tail>
  static Vec<A> memory_gradient(const TailBlock<Tail, A>& block, const Vec<A>* gate, Size at,
                                Vec<A>* grad_gate) {
    const Vec<A> own = load(block.grad_state + Tail::layout.memory * block.stride + at);
    if constexpr (Tail::layout.slots == 1) {
      return own;
    } else {
      const Vec<A> squashed = load(block.squashed + at);
      const Vec<A> grad =
          Tail::output_backward(gate, squashed, load(block.grad_state + at), grad_gate);
      return own + activation_gradient<A>(Tail::squash, squashed, grad);
    }
  }

  // Units [first, first + n) of the hidden layer of a branch, before its ReLU.
  void hidden_gradients(int b, Size group, Size first, Size n) const {
    A* to = hidden_[b].of(group, first);
    std::fill_n(to, cell_.size(n), A(0));
    multiply_add<A>(n, cell_.groups.columns(group), all_gates(),
                    {cell_.param(layout().branch[b].w2) + first, 1, hidden()}, gates_.of(group),
                    width(), to, width());
    activate_backward(Activation::relu, cell_.hidden(b, group, first), to, cell_.size(n));
  }

  // All rows read row 0: its gradient is a sum over them.
  bool sums_rows(int source) const { return source != kInput && cell_.in.first_sample; }

  // Channels [c, c + n) of y or of a slot of the state.
  void input_gradients(int source, Size group, Size c, Size n) const {
    thread_local Scratch scratch;
    const Size size = cell_.size(n);
    A* grad = scratch.reserve<A>(size);
    std::fill_n(grad, size, A(0));
    add_readers(source, group, c, n, grad);
    if (source == slot_source(layout().memory)) {
      if (layout().reads(kNormalised)) {
        add_readers(kNormalised, group, c, n, grad);
        activate_backward(cell_.cell.activation, cell_.input(kNormalised, group, c), grad, size);
      }
      const A* own = memory_.of(group, c);
      for (Size i = 0; i < size; i += kLanes<A>) store(grad + i, load(grad + i) + load(own + i));
    }
    A* to = source == kInput ? to_.y : to_.state + (source - kSlot0) * cell_.in.batch * channels();
    to += c;
    if (sums_rows(source)) return add_row_sums(grad, n, width(), to);
    to += cell_.groups.first_row(group) * channels();
    unpack<true, A>(grad, n, width(), {to, channels(), cell_.groups.rows_in(group)});
  }

  // What comes through the layers that read channels [c, c + n) of a source.
  void add_readers(int source, Size group, Size c, Size n, A* grad) const {
    for (int b = 0; b < layout().branches; ++b) {
      const Branch& branch = layout().branch[b];
      for (int i = 0; i < branch.sources; ++i) {
        if (branch.source[i] != source) continue;
        if (!branch.has_hidden()) {
          multiply_add<A>(n, cell_.groups.columns(group), all_gates(),
                          {cell_.param(branch.w2) + c, 1, channels()}, gates_.of(group), width(),
                          grad, width());
          continue;
        }
        const A* weights = cell_.param(branch.w1) + i * channels() + c;
        multiply_add<A>(n, cell_.groups.columns(group), hidden(),
                        {weights, 1, branch.sources * channels()}, hidden_[b].of(group), width(),
                        grad, width());
      }
    }
  }

  // Whether the sums over the rows begin with this group.
  bool starts(Size group) const { return group == 0 && to_.fresh_params; }

  // Sums over the rows: a task takes all groups.
  template <class Body>
  auto all_groups(const Stage<Body>& stage) const {
    const auto task = [this, stage](Size index) {
      for (Size group = 0; group < cell_.groups.count; ++group) stage.run(group, index);
    };
    return Loop<decltype(task)>{stage.tasks(), task};
  }

  auto first_row_loop() const {
    const Size slots = cell_.in.first_sample ? layout().slots : 0;
    return all_groups(stage_of_sets(slots, channels(), kChannels,
                                    [this](int slot, Size group, Size c, Size n) {
                                      input_gradients(slot_source(slot), group, c, n);
                                    }));
  }

  auto hidden_weights_loop() const {
    const int sets = layout().has_hidden() ? layout().branches : 0;
    return all_groups(stage_of_sets(sets, channels(), kChannels,
                                    [this](int b, Size group, Size c, Size n) {
                                      hidden_weights(b, group, c, n);
                                    }));
  }

  // W1 of a branch, columns [c, c + n) of every source, and b1 with the first of them.
  void hidden_weights(int b, Size group, Size c, Size n) const {
    const Branch& branch = layout().branch[b];
    const Size stride = branch.sources * channels();
    const Size rows = cell_.groups.rows_in(group);
    for (int i = 0; i < branch.sources; ++i) {
      const Rows<const A> input = cell_.rows(branch.source[i], group).from(c);
      A* block = to_.params[branch.w1] + i * channels() + c;
      if (starts(group))
        for (Size unit = 0; unit < hidden(); ++unit) std::fill_n(block + unit * stride, n, A(0));
      multiply_add<A>(hidden(), n, rows, {hidden_[b].of(group), width(), 1}, input.data,
                      input.stride, block, stride);
    }
    if (c > 0 || branch.b1 < 0) return;
    A* bias = to_.params[branch.b1];
    if (starts(group)) std::fill_n(bias, hidden(), A(0));
    add_row_sums(hidden_[b].of(group), hidden(), width(), bias);
  }

  auto gate_weights_loop() const {
    return all_groups(stage_of_sets(layout().branches, all_gates(), kChannels,
                                    [this](int b, Size group, Size first, Size n) {
                                      gate_weights(b, group, first, n);
                                    }));
  }

  // W2 of a branch, rows [first, first + n), and b2.
  void gate_weights(int b, Size group, Size first, Size n) const {
    const Rows<const A> input = cell_.gate_input_rows(b, group);
    const Size inputs = cell_.gate_inputs();
    A* weights = to_.params[layout().branch[b].w2] + first * inputs;
    if (starts(group)) std::fill_n(weights, n * inputs, A(0));
    multiply_add<A>(n, inputs, input.count, {gates_.of(group, first), width(), 1}, input.data,
                    input.stride, weights, inputs);
    // The gates are a sum over the branches: all their biases have one gradient.
    A* bias = to_.params[layout().branch[b].b2] + first;
    if (starts(group)) std::fill_n(bias, n, A(0));
    add_row_sums(gates_.of(group, first), n, width(), bias);
  }

  const Evaluation<A>& cell_;
  const A* grad_out_;
  const int given_slots_;  // that grad_out has
  const CellGradients<A>& to_;
  const Panels<A> gates_, memory_;
  Panels<A> hidden_[2] = {};
};

}  // namespace dla::DLA_ISA::cell_detail
