#include <algorithm>
#include <stdexcept>

#include "common/parallel.h"
#include "ops/cell/cell.h"

namespace dla::DLA_ISA {
namespace {

// Weights of the argument struct, for A = float or double.
template <class A, class Args>
CellWeights<A> weights_of(const Args& args) {
  CellWeights<A> cell{args.kind, args.activation, args.channels, args.hidden, {}};
  const int expected =
      with_tail(args.kind, [](auto tail) { return decltype(tail)::layout.params; });
  if (static_cast<int>(args.params.size()) != expected)
    throw std::invalid_argument("cell: wrong number of parameters for this kind");
  for (int i = 0; i < expected; ++i) cell.params[i] = static_cast<const A*>(args.params[i]);
  return cell;
}

template <class Body>
void with_compute_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    default: throw std::invalid_argument("cell: dtype must be 0 (f32) or 1 (f64)");
  }
}

template <class A>
void forward(const CellForward& args) {
  const CellWeights<A> cell = weights_of<A>(args);
  const Size rows = kLanes<A>;
  parallel_for(args.threads, (args.batch + rows - 1) / rows, [&](Size tile) {
    thread_local Scratch scratch;
    const Size r = tile * rows;
    cell_forward_rows(cell, static_cast<const A*>(args.y), static_cast<const A*>(args.state), false,
                      args.batch, r, std::min(r + rows, args.batch), static_cast<A*>(args.out),
                      false, scratch);
  });
}

template <class A>
void backward(const CellBackward& args) {
  const CellWeights<A> cell = weights_of<A>(args);
  A* grad_params[kMaxCellParams] = {};
  for (std::size_t i = 0; i < args.grad_params.size() && i < kMaxCellParams; ++i)
    grad_params[i] = static_cast<A*>(args.grad_params[i]);
  cell_backward(cell, static_cast<const A*>(args.y), static_cast<const A*>(args.state), false,
                args.batch, static_cast<const A*>(args.grad_out), false,
                static_cast<A*>(args.grad_y), static_cast<A*>(args.grad_state), grad_params,
                args.threads);
}

}  // namespace

void cell_forward(const CellForward& args) {
  with_compute_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void cell_backward(const CellBackward& args) {
  with_compute_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace dla::DLA_ISA
