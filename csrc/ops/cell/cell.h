// The recurrent cells, for cpu.cpp and for ops that contain a cell.
#pragma once

#include <cstdint>

#include "common/scratch.h"
#include "common/simd.h"
#include "ops/cell/op.h"

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
// new state is not computed into memory). `out` may not overlap the inputs. No barriers: a caller
// divides the rows among its threads as it likes, the results are the same to the bit. Rows come
// in tiles of kLanes<A>, so a division at multiples of it wastes nothing.
template <class A>
void cell_forward_rows(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                       std::int64_t batch, std::int64_t r0, std::int64_t r1, A* out,
                       bool output_only, Scratch& scratch);

// Gradients of one cell step from that of the new state, grad_out [slots, batch, channels], or of
// the output alone, [batch, channels], with `output_only`. Adds to grad_y [batch, channels],
// grad_state [slots, batch, channels] (to its row 0 with `first_sample`) and grad_params; a null
// pointer skips that gradient. Nothing saved by the forward is needed. Opens its own parallel
// region of `threads` threads; the results do not depend on their number.
template <class A>
void cell_backward(const CellWeights<A>& cell, const A* y, const A* state, bool first_sample,
                   std::int64_t batch, const A* grad_out, bool output_only, A* grad_y,
                   A* grad_state, A* const grad_params[kMaxCellParams], int threads);

}  // namespace dla::DLA_ISA
