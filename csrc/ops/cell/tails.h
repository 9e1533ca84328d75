// What distinguishes one kind of cell from another: where its parameters act (CellLayout) and the
// pointwise function behind the products (a tail). Everything else is one scaffold: evaluation.h
// and gradients.h on the CPU, whose values are vectors, cuda.cu on GPUs, where they are numbers.
#pragma once

#include "ops/cell/op.h"

namespace dla::DLA_ISA {

// A vector that a layer reads: y, a slot of the state, or the memory after the cell's activation.
enum Source : int { kInput, kSlot0, kSlot1, kNormalised, kSources };

constexpr Source slot_source(int slot) { return static_cast<Source>(kSlot0 + slot); }

// gates += W2 hidden + b2 with hidden = ReLU(W1 [sources] + b1), the sources side by side; or without
// a hidden layer, gates += W2 source + b2. Numbers are positions in the parameter list.
struct Branch {
  int sources;
  Source source[2];
  int w1, b1, w2, b2;  // b1 = -1: none; w1 = -1: no hidden layer

  DLA_HOST_DEVICE bool has_hidden() const { return w1 >= 0; }
};

struct CellLayout {
  int slots, memory, gates, params;  // memory: the slot that the tail updates
  int branches;
  Branch branch[2];

  bool reads(Source source) const {
    for (int b = 0; b < branches; ++b)
      for (int i = 0; i < branch[b].sources; ++i)
        if (branch[b].source[i] == source) return true;
    return false;
  }
  DLA_HOST_DEVICE bool has_hidden() const { return branch[0].has_hidden(); }
};

// A tail: gates -> new state, pointwise. The gates go through their activations; update() makes the
// new memory of them and of the old one. Where the state has a slot for the output besides, the
// memory goes through the activation `squash` and output() makes the output of it. The activations
// are applied outside, to blocks of values: only so do enough of their long chains of operations
// overlap. What is left here are products, and so are the gradients, those of the activated gates.

// i, f, c~ -> c' = f c + i c~.
struct GatedMemory {
  static constexpr int gates = 3;
  static constexpr Activation gate_activation[gates] = {Activation::sigmoid, Activation::sigmoid,
                                                        Activation::tanh};

  template <class V>
  DLA_HOST_DEVICE static V update(const V* gate, V old) {
    return gate[1] * old + gate[0] * gate[2];
  }
  // Sets the gradients of the three gates and returns that of `old`.
  template <class V>
  DLA_HOST_DEVICE static V update_backward(const V* gate, V old, V grad, V* grad_gate) {
    grad_gate[0] = grad * gate[2];
    grad_gate[1] = grad * old;
    grad_gate[2] = grad * gate[0];
    return grad * gate[1];
  }
};

struct DsuTail : GatedMemory {
  static constexpr CellLayout layout{1, 0, gates, 3, 1, {{2, {kNormalised, kInput}, 0, -1, 1, 2}}};
};

struct DsuSplitTail : GatedMemory {
  static constexpr CellLayout layout{
      2, 1, gates, 8, 2, {{1, {kInput}, 0, 1, 2, 3}, {1, {kSlot0}, 4, 5, 6, 7}}};
  static constexpr Activation squash = Activation::sigmoid;

  template <class V>
  DLA_HOST_DEVICE static V output(const V*, V squashed) {
    return squashed;
  }
  // Sets the gradients of output gates, if the kind has any, and returns that of `squashed`.
  template <class V>
  DLA_HOST_DEVICE static V output_backward(const V*, V, V grad, V*) {
    return grad;
  }
};

// The gates (i, f, c~, o), the last of which the output passes: h' = o squash(c').
struct GatedOutput {
  static constexpr int gates = 4;
  static constexpr Activation gate_activation[gates] = {Activation::sigmoid, Activation::sigmoid,
                                                        Activation::tanh, Activation::sigmoid};

  template <class V>
  DLA_HOST_DEVICE static V update(const V* gate, V old) {
    return GatedMemory::update(gate, old);
  }
  template <class V>
  DLA_HOST_DEVICE static V update_backward(const V* gate, V old, V grad, V* grad_gate) {
    return GatedMemory::update_backward(gate, old, grad, grad_gate);
  }
  template <class V>
  DLA_HOST_DEVICE static V output(const V* gate, V squashed) {
    return gate[3] * squashed;
  }
  template <class V>
  DLA_HOST_DEVICE static V output_backward(const V* gate, V squashed, V grad, V* grad_gate) {
    grad_gate[3] = grad * squashed;
    return grad * gate[3];
  }
};

struct DiaTail : GatedOutput {
  static constexpr CellLayout layout{
      2, 1, gates, 8, 2, {{1, {kInput}, 0, 1, 2, 3}, {1, {kSlot0}, 4, 5, 6, 7}}};
  static constexpr Activation squash = Activation::sigmoid;
};

struct LstmTail : GatedOutput {
  static constexpr CellLayout layout{
      2, 1, gates, 4, 2, {{1, {kInput}, -1, -1, 0, 2}, {1, {kSlot0}, -1, -1, 1, 3}}};
  static constexpr Activation squash = Activation::tanh;
};

// h' = tanh(its one gate).
struct RnnTail {
  static constexpr int gates = 1;
  static constexpr Activation gate_activation[gates] = {Activation::tanh};
  static constexpr CellLayout layout{
      1, 0, gates, 4, 2, {{1, {kInput}, -1, -1, 0, 2}, {1, {kSlot0}, -1, -1, 1, 3}}};

  template <class V>
  DLA_HOST_DEVICE static V update(const V* gate, V) {
    return gate[0];
  }
  template <class V>
  DLA_HOST_DEVICE static V update_backward(const V*, V, V grad, V* grad_gate) {
    grad_gate[0] = grad;
    return V{};
  }
};

// Calls body(tail) with the tail of the kind: the one list of all kinds.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Body>
DLA_HOST_DEVICE auto with_tail(CellKind kind, Body&& body) {
  switch (kind) {
    case CellKind::dsu: return body(DsuTail{});
    case CellKind::dsu_split: return body(DsuSplitTail{});
    case CellKind::dia: return body(DiaTail{});
    case CellKind::lstm: return body(LstmTail{});
    case CellKind::rnn: break;
  }
  return body(RnnTail{});
}

}  // namespace dla::DLA_ISA
