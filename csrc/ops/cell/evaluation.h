// One evaluation of a cell on a whole batch, in stages: its inputs are packed; the hidden layers;
// the gates and what the tail makes of them. layout.h says what a kind of cell is, panel.h how its
// numbers lie in memory.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "ops/cell/cell.h"
#include "ops/cell/layout.h"
#include "ops/cell/panel.h"

namespace dla::DLA_ISA::cell_detail {

constexpr Size kChannels = 32;  // channels that a task takes
constexpr Size kUnits = 16;     // hidden units that a task takes

// Memory that the calling thread keeps from call to call.
struct Workspace {
  Scratch inputs[kSources], hidden[2];
  Scratch hidden_rows[2], normalised_rows, grad_gates, grad_memory, grad_hidden[2];  // backward
};

// body(group, first, count) for all groups of rows and all blocks of up to `block` of n values.
template <class Body>
struct Stage {
  Size n, block;
  Body body;

  Size tasks() const { return ceil_div(n, block); }
  void run(Size group, Size task) const {
    const Size first = task * block;
    body(group, first, std::min(block, n - first));
  }
};
template <class Body>
Stage(Size, Size, Body) -> Stage<Body>;

// body(index, group, first, count) for every index < `sets` of such n values. Blocks of all sets take
// turns: sets may differ in work, threads should not.
template <class Body>
auto stage_of_sets(Size sets, Size n, Size block, const Body& body) {
  return Stage{sets * round_up(n, block), block, [=](Size group, Size first, Size) {
                 const Size turn = first / block, from = turn / sets * block;
                 body(static_cast<int>(turn % sets), group, from, std::min(block, n - from));
               }};
}

// Stages that each need the whole of the one before, but only its own group of rows. If `large` groups
// can be shared out evenly, a thread takes a group through all stages and finds it in its cache.
// Else the threads share out every stage, blocks before groups: so they share out the weights.
template <class... Bodies>
void run_stages(int threads, Size groups, bool large, const Stage<Bodies>&... stages) {
  if (large && (groups % threads == 0 || groups >= 4 * threads)) {
    parallel_for(threads, groups, [&](Size group) {
      const auto run = [group](const auto& stage) {
        for (Size task = 0; task < stage.tasks(); ++task) stage.run(group, task);
      };
      (run(stages), ...);
    });
  } else {
    const auto run = [=](const auto& stage) {
      parallel_for(threads, stage.tasks() * groups,
                   [&](Size i) { stage.run(i % groups, i / groups); });
    };
    (run(stages), ...);
  }
}

template <class A>
class Evaluation {
 public:
  const CellWeights<A>& cell;
  const CellLayout& layout;
  const CellInputs<A>& in;
  const Groups<A> groups;

  // Of a `forward` step nothing is kept for a backward pass.
  Evaluation(const CellWeights<A>& cell, const CellLayout& layout, const CellInputs<A>& in,
             Workspace& workspace, bool forward)
      : cell(cell), layout(layout), in(in), groups(in.batch, forward && are_few(in)) {
    for (int source = kInput; source <= kSlot0 + layout.slots - 1; ++source)
      inputs_[source] = panels(workspace.inputs[source], channels());
    if (layout.reads(kNormalised))
      inputs_[kNormalised] = panels(workspace.inputs[kNormalised], channels());
    if (!layout.has_hidden()) return;
    for (int b = 0; b < layout.branches; ++b)
      hidden_[b] = panels(workspace.hidden[b], cell.hidden);
  }

  static bool are_few(const CellInputs<A>& in) {
    return in.row_by_row || in.slot_rows <= kLanes<A> / 4;
  }

  // The backward pass also wants the inputs of its layers as rows.
  void keep_rows(Workspace& workspace) {
    if (layout.reads(kNormalised))
      normalised_rows_ = workspace.normalised_rows.reserve<A>(in.batch * channels());
    if (!layout.has_hidden()) return;
    for (int b = 0; b < layout.branches; ++b)
      hidden_rows_[b] = workspace.hidden_rows[b].reserve<A>(in.batch * cell.hidden);
  }

  // The stages before the gates and any that follow.
  template <class... Bodies>
  void run(int threads, const Stage<Bodies>&... following) const {
    run_stages(threads, groups.count, !groups.single(),
               Stage{channels(), kChannels,
                     [this](Size group, Size c, Size n) { pack_inputs(group, c, n); }},
               stage_of_sets(layout.branches, hidden_units(), kUnits,
                             [this](int b, Size group, Size first, Size n) {
                               hidden_layer(b, group, first, n);
                             }),
               following...);
  }

  // Gates of channels [c, c + n) before their activations, gate g at gates + g stride.
  void gate_layer(Size group, Size c, Size n, Size stride, A* gates) const {
    for (int g = 0; g < layout.gates; ++g) {
      const Size first = g * channels() + c;
      A* out = gates + g * stride;
      const A* bias = param(layout.branch[0].b2);
      const A* other = layout.branches == 2 ? param(layout.branch[1].b2) : nullptr;
      fill(n, [=](Size i) { return bias[first + i] + (other ? other[first + i] : A(0)); }, out);
      for (int b = 0; b < layout.branches; ++b) {
        const A* weights = param(layout.branch[b].w2) + first * gate_inputs();
        multiply_add<A>(n, groups.columns(group), gate_inputs(), {weights, gate_inputs(), 1},
                        gate_input(b, group), groups.width, out, groups.width);
      }
    }
  }

  Size channels() const { return cell.channels; }
  Size hidden_units() const { return layout.has_hidden() ? cell.hidden : 0; }
  // Numbers that a branch makes the gates of.
  Size gate_inputs() const { return layout.has_hidden() ? cell.hidden : channels(); }
  const A* gate_input(int b, Size group) const {
    return layout.has_hidden() ? hidden_[b].of(group) : input(layout.branch[b].source[0], group, 0);
  }
  Rows<const A> gate_input_rows(int b, Size group) const {
    if (!layout.has_hidden()) return rows(layout.branch[b].source[0], group);
    const Rows<A> kept = hidden_rows(b, group);
    return {kept.data, kept.stride, kept.count};
  }
  const A* param(int index) const { return cell.params[index]; }
  Size size(Size n) const { return groups.size(n); }
  const A* input(Source source, Size group, Size c) const { return inputs_[source].of(group, c); }
  const A* hidden(int b, Size group, Size unit) const { return hidden_[b].of(group, unit); }

  Panels<A> panels(Scratch& scratch, Size n) const {
    n = round_up(n, groups.lanes);
    return {scratch.reserve<A>(groups.count * n * groups.width), n, groups.width};
  }

  // Rows of a group of y, of a slot of the state, or of what keep_rows() kept.
  Rows<const A> rows(Source source, Size group) const {
    const Size first = groups.first_row(group), count = groups.rows_in(group);
    if (source == kNormalised)
      return {normalised_rows_ + first * channels(), channels(), count};
    if (source == kInput) return {in.y + first * channels(), channels(), count};
    const A* slot = in.state + (source - kSlot0) * in.slot_rows * channels();
    if (in.first_sample) return {slot, 0, count};
    return {slot + first * channels(), channels(), count};
  }
  Rows<A> hidden_rows(int b, Size group) const {
    return {hidden_rows_[b] + groups.first_row(group) * cell.hidden, cell.hidden,
            groups.rows_in(group)};
  }

 private:
  template <class Value>
  void fill(Size n, const Value& value, A* panel) const {
    for (Size i = 0; i < n; ++i) {
      if (groups.single()) {
        panel[i] = value(i);
        continue;
      }
      const Vec<A> row = splat<A>(value(i));
      for (Size lane = 0; lane < groups.width; lane += kLanes<A>)
        store(panel + i * groups.width + lane, row);
    }
  }

  void pack_inputs(Size group, Size c, Size n) const {
    for (int source = kInput; source <= kSlot0 + layout.slots - 1; ++source)
      pack<A>(rows(static_cast<Source>(source), group).from(c), n, groups.width,
              inputs_[source].of(group, c));
    A* normalised = inputs_[kNormalised].data;
    if (normalised == nullptr) return;
    normalised = inputs_[kNormalised].of(group, c);
    std::copy_n(input(slot_source(layout.memory), group, c), size(n), normalised);
    activate(cell.activation, normalised, size(n));
    if (normalised_rows_ == nullptr) return;
    A* to = normalised_rows_ + groups.first_row(group) * channels() + c;
    unpack<false, A>(normalised, n, groups.width, {to, channels(), groups.rows_in(group)});
  }

  // Units [first, first + n) of the hidden layer of a branch.
  void hidden_layer(int b, Size group, Size first, Size n) const {
    const Branch& branch = layout.branch[b];
    const Size depth = branch.sources * channels();
    A* out = hidden_[b].of(group, first);
    const A* bias = branch.b1 < 0 ? nullptr : param(branch.b1) + first;
    fill(n, [=](Size i) { return bias == nullptr ? A(0) : bias[i]; }, out);
    for (int i = 0; i < branch.sources; ++i) {
      const A* weights = param(branch.w1) + first * depth + i * channels();
      multiply_add<A>(n, groups.columns(group), channels(), {weights, depth, 1},
                      input(branch.source[i], group, 0), groups.width, out, groups.width);
    }
    activate(Activation::relu, out, size(n));
    if (hidden_rows_[b] != nullptr)
      unpack<false, A>(out, n, groups.width, hidden_rows(b, group).from(first));
  }

  Panels<A> inputs_[kSources] = {}, hidden_[2] = {};
  A *normalised_rows_ = nullptr, *hidden_rows_[2] = {};
};

// Working memory of a tail for kChannels channels of a group.
template <class Tail, class A>
struct TailBlock {
  static constexpr int slots = Tail::layout.slots;
  Size stride;  // from gate to gate and from slot to slot
  A *gates, *squashed, *state, *grad_state;

  TailBlock(Scratch& scratch, Size width) : stride(kChannels * width) {
    gates = scratch.reserve<A>((Tail::gates + 1 + 2 * slots) * stride);
    squashed = gates + Tail::gates * stride;
    state = squashed + stride;
    grad_state = state + slots * stride;
  }

  void load_gates(Size at, Vec<A>* gate) const {
    for (int g = 0; g < Tail::gates; ++g) gate[g] = load(gates + g * stride + at);
  }
};

// Activated gates and new state of channels [c, c + n).
template <class Tail, class A>
void forward_block(const Evaluation<A>& cell, Size group, Size c, Size n,
                   const TailBlock<Tail, A>& block) {
  constexpr int slot = Tail::layout.memory;
  const Size size = cell.size(n);
  cell.gate_layer(group, c, n, block.stride, block.gates);
  for (int g = 0; g < Tail::gates; ++g)
    activate(Tail::gate_activation[g], block.gates + g * block.stride, size);
  const A* old = cell.input(slot_source(slot), group, c);
  A* memory = block.state + slot * block.stride;
  Vec<A> gate[Tail::gates];
  for (Size i = 0; i < size; i += kLanes<A>) {
    block.load_gates(i, gate);
    store(memory + i, Tail::update(gate, load(old + i)));
  }
  if constexpr (Tail::layout.slots > 1) {
    std::copy_n(memory, size, block.squashed);
    activate(Tail::squash, block.squashed, size);
    for (Size i = 0; i < size; i += kLanes<A>) {
      block.load_gates(i, gate);
      store(block.state + i, Tail::output(gate, load(block.squashed + i)));
    }
  }
}

}  // namespace dla::DLA_ISA::cell_detail
