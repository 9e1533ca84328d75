// What distinguishes one kind of cell from another: where its parameters act (CellLayout) and the
// pointwise function behind the products (a tail). Everything else is one scaffold, cell.h.
#pragma once

#include <stdexcept>

#include "common/simd.h"
#include "common/vmath.h"
#include "ops/cell/op.h"

namespace dla::DLA_ISA {

constexpr int kInput = -1;  // a Source that is y

// One of the vectors, side by side, that a hidden layer reads.
struct Source {
  int slot;        // of the state, or kInput
  bool activated;  // normalised by the cell's activation first
};

// gates += W2 ReLU(W1 [sources] + b1) + b2; numbers are positions in the parameter list.
struct Branch {
  int sources;
  Source source[2];
  int w1, b1, w2, b2;  // b1 = -1: none
};

struct CellLayout {
  int slots, gates, params;
  int branches;
  Branch branch[2];
};

// A tail: gates -> new state, elementwise. `gates` and `slots` are its widths, `memory` the slot of
// the old state that it reads. backward() gives the gradients of the gates and of the memory from
// those of the new slots.

// i, f, candidate -> c' = sigmoid(f) c + sigmoid(i) tanh(candidate).
template <class A>
struct MemoryUpdate {
  Vec<A> input, forget, candidate, memory;

  MemoryUpdate(const Vec<A>* gates, Vec<A> old)
      : input(sigmoid<A>(gates[0])),
        forget(sigmoid<A>(gates[1])),
        candidate(tanh<A>(gates[2])),
        memory(forget * old + input * candidate) {}

  void backward(Vec<A> grad, Vec<A> old, Vec<A>* grad_gates, Vec<A>& grad_old) const {
    grad_gates[0] = grad * candidate * input * (A(1) - input);
    grad_gates[1] = grad * old * forget * (A(1) - forget);
    grad_gates[2] = grad * input * (A(1) - candidate * candidate);
    grad_old = grad * forget;
  }
};

struct DsuTail {
  static constexpr int gates = 3, slots = 1, memory = 0;
  static constexpr CellLayout layout{
      slots, gates, 3, 1, {{2, {{memory, true}, {kInput, false}}, 0, -1, 1, 2}}};

  template <class A>
  static void forward(const Vec<A>* gates, Vec<A> old, Vec<A>* state) {
    state[0] = MemoryUpdate<A>(gates, old).memory;
  }
  template <class A>
  static void backward(const Vec<A>* gates, Vec<A> old, const Vec<A>* grad_state,
                       Vec<A>* grad_gates, Vec<A>& grad_old) {
    MemoryUpdate<A>(gates, old).backward(grad_state[0], old, grad_gates, grad_old);
  }
};

struct DsuSplitTail {
  static constexpr int gates = 3, slots = 2, output = 0, memory = 1;
  static constexpr CellLayout layout{
      slots,
      gates,
      8,
      2,
      {{1, {{kInput, false}}, 0, 1, 2, 3}, {1, {{output, false}}, 4, 5, 6, 7}}};

  template <class A>
  static void forward(const Vec<A>* gates, Vec<A> old, Vec<A>* state) {
    state[memory] = MemoryUpdate<A>(gates, old).memory;
    state[output] = sigmoid<A>(state[memory]);
  }
  template <class A>
  static void backward(const Vec<A>* gates, Vec<A> old, const Vec<A>* grad_state,
                       Vec<A>* grad_gates, Vec<A>& grad_old) {
    const MemoryUpdate<A> update(gates, old);
    const Vec<A> h = sigmoid<A>(update.memory);
    const Vec<A> grad = grad_state[memory] + grad_state[output] * h * (A(1) - h);
    update.backward(grad, old, grad_gates, grad_old);
  }
};

// Calls body(tail) with the tail of the kind: the one list of all kinds.
template <class Body>
auto with_tail(CellKind kind, Body&& body) {
  switch (kind) {
    case CellKind::dsu: return body(DsuTail{});
    case CellKind::dsu_split: return body(DsuSplitTail{});
  }
  throw std::invalid_argument("cell: unknown kind");
}

// u <- act(u), `count` elements, a multiple of the vector length.
template <class A>
void activate(Activation kind, A* u, std::int64_t count) {
  const auto apply = [&](auto&& function) {
    for (std::int64_t i = 0; i < count; i += kLanes<A>) store(u + i, function(load(u + i)));
  };
  switch (kind) {
    case Activation::sigmoid: return apply([](Vec<A> v) { return sigmoid<A>(v); });
    case Activation::tanh: return apply([](Vec<A> v) { return tanh<A>(v); });
    case Activation::relu: return apply([](Vec<A> v) { return v < A(0) ? Vec<A>{} : v; });
    case Activation::identity: return;
  }
}

// grad <- grad * act'(u), given a = act(u).
template <class A>
void activate_backward(Activation kind, const A* a, A* grad, std::int64_t count) {
  const auto apply = [&](auto&& function) {
    for (std::int64_t i = 0; i < count; i += kLanes<A>)
      store(grad + i, function(load(a + i), load(grad + i)));
  };
  switch (kind) {
    case Activation::sigmoid:
      return apply([](Vec<A> v, Vec<A> g) { return g * v * (A(1) - v); });
    case Activation::tanh: return apply([](Vec<A> v, Vec<A> g) { return g * (A(1) - v * v); });
    case Activation::relu:
      return apply([](Vec<A> v, Vec<A> g) { return v <= A(0) ? Vec<A>{} : g; });
    case Activation::identity: return;
  }
}

}  // namespace dla::DLA_ISA
