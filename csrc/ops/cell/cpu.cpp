#include <stdexcept>

#include "ops/cell/gradients.h"

namespace dla::DLA_ISA {

int cell_slots(CellKind kind) {
  return with_tail(kind, [](auto tail) { return decltype(tail)::layout.slots; });
}

template <class A>
void cell_forward(const CellWeights<A>& cell, const CellInputs<A>& in, A* out, bool output_only,
                  int threads) {
  using namespace cell_detail;
  with_tail(cell.kind, [&](auto tail) {
    using Tail = decltype(tail);
    thread_local Workspace workspace;
    const Evaluation<A> evaluation(cell, Tail::layout, in, workspace, true);
    const auto block = [&](Size group, Size c, Size n) {
      thread_local Scratch scratch;
      const TailBlock<Tail, A> block(scratch, evaluation.groups.width);
      forward_block(evaluation, group, c, n, block);
      for (int slot = 0; slot < (output_only ? 1 : Tail::layout.slots); ++slot) {
        const Size row = slot * in.slot_rows + evaluation.groups.first_row(group);
        unpack<false, A>(block.state + slot * block.stride, n, evaluation.groups.width,
                         {out + row * cell.channels + c, cell.channels,
                          evaluation.groups.rows_in(group)});
      }
    };
    evaluation.run(threads, Stage{cell.channels, kChannels, block});
  });
}

template <class A>
void cell_backward(const CellWeights<A>& cell, const CellInputs<A>& in, const A* grad_out,
                   bool output_only, A* grad_y, A* grad_state,
                   A* const grad_params[kMaxCellParams], bool fresh_params, int threads) {
  using namespace cell_detail;
  with_tail(cell.kind, [&](auto tail) {
    using Tail = decltype(tail);
    thread_local Workspace workspace;
    Evaluation<A> evaluation(cell, Tail::layout, in, workspace, false);
    evaluation.keep_rows(workspace);
    const CellGradients<A> to{grad_y, grad_state, grad_params, fresh_params};
    Gradients<A>(evaluation, grad_out, output_only, to, workspace).template run<Tail>(threads);
  });
}

#define DLA_INSTANTIATE(A)                                                                        \
  template void cell_forward<A>(const CellWeights<A>&, const CellInputs<A>&, A*, bool, int);      \
  template void cell_backward<A>(const CellWeights<A>&, const CellInputs<A>&, const A*, bool, A*, \
                                 A*, A* const[kMaxCellParams], bool, int);
DLA_INSTANTIATE(float)
#ifdef DLA_DOUBLES
DLA_INSTANTIATE(double)
#endif
#undef DLA_INSTANTIATE

namespace {

// Weights of the argument struct, for A = float or double.
template <class A, class Args>
CellWeights<A> weights_of(const Args& args) {
  CellWeights<A> cell{args.kind, args.activation, args.channels, args.hidden, {}};
  const int expected =
      with_tail(args.kind, [](auto tail) { return decltype(tail)::layout.params; });
  if (static_cast<int>(args.params.size()) != expected)
    throw std::invalid_argument("cell: wrong number of parameters for this kind");
  for (int i = 0; i < expected; ++i) cell.params[i] = as<A>(args.params[i]);
  return cell;
}

template <class A, class Args>
CellInputs<A> inputs_of(const Args& args) {
  return {as<A>(args.y), as<A>(args.state), args.batch};
}

template <class A>
void forward(const CellForward& args) {
  cell_forward(weights_of<A>(args), inputs_of<A>(args), as<A>(args.out), false, args.threads);
}

template <class A>
void backward(const CellBackward& args) {
  const CellWeights<A> cell = weights_of<A>(args);
  A* grad_params[kMaxCellParams] = {};
  for (std::size_t i = 0; i < args.grad_params.size() && i < kMaxCellParams; ++i)
    grad_params[i] = as<A>(args.grad_params[i]);
  A *grad_y = as<A>(args.grad_y), *grad_state = as<A>(args.grad_state);
  const Size size = args.batch * args.channels;
  std::fill_n(grad_y, size, A(0));
  std::fill_n(grad_state, cell_slots(args.kind) * size, A(0));
  cell_backward(cell, inputs_of<A>(args), as<A>(args.grad_out), false, grad_y, grad_state,
                grad_params, true, args.threads);
}

}  // namespace

void cell_forward(const CellForward& args) {
  with_compute_type(args.dtype, [&](auto zero) { forward<decltype(zero)>(args); });
}

void cell_backward(const CellBackward& args) {
  with_compute_type(args.dtype, [&](auto zero) { backward<decltype(zero)>(args); });
}

}  // namespace dla::DLA_ISA
