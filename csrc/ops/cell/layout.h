// The SIMD side of what distinguishes kinds of cells (tails.h): activations of blocks of values.
#pragma once

#include "common/simd.h"
#include "common/vmath.h"
#include "ops/cell/tails.h"

namespace dla::DLA_ISA {

// u <- act(u), `count` elements, a multiple of the vector length.
template <class A>
[[gnu::noinline]] void activate(Activation kind, A* u, std::int64_t count) {
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

// Gradient of u from that of a = act(u).
template <class A>
inline Vec<A> activation_gradient(Activation kind, Vec<A> a, Vec<A> grad) {
  switch (kind) {
    case Activation::sigmoid: return grad * a * (A(1) - a);
    case Activation::tanh: return grad * (A(1) - a * a);
    case Activation::relu: return a <= A(0) ? Vec<A>{} : grad;
    case Activation::identity: break;
  }
  return grad;
}

// The same for `count` elements in place, a multiple of the vector length.
template <class A>
[[gnu::noinline]] void activate_backward(Activation kind, const A* a, A* grad, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<A>)
    store(grad + i, activation_gradient<A>(kind, load(a + i), load(grad + i)));
}

}  // namespace dla::DLA_ISA
