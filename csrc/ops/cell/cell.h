// The recurrent cells, for ops that contain one. They are compiled in ops/cell/cpu.cpp.
#pragma once

#include <cstdint>

#include "ops/cell/op.h"

namespace dla::DLA_ISA {

template <class A>
struct CellWeights {
  CellKind kind;
  Activation activation;
  std::int64_t channels, hidden;
  const A* params[kMaxCellParams];  // in the order of the kind, dense
};

// What a step is made from: y [batch, channels] and state [slots, batch, channels].
template <class A>
struct CellInputs {
  const A *y, *state;
  std::int64_t batch;
  bool first_sample = false;  // every row reads row 0 of the state
  // Rows of a slot of the old state and the new one; more than `batch` where these are parts.
  std::int64_t slot_rows = batch;
  // Forward, whether rows are evaluated one by one, as is done with few of them: faster where parts have
  // few rows. A row's result depends on this and on slot_rows, not on the part that it is in, whose size
  // may depend on the number of threads.
  bool row_by_row = false;
};

// Slots of the state of a kind.
int cell_slots(CellKind kind);

// One cell step. `out` is the new state [slots, batch, channels], or [batch, channels] with
// `output_only` (the cell's output, slot 0; the rest of the new state is not written); it may not
// overlap the inputs. Opens its own parallel regions of `threads` threads; the results do not
// depend on their number.
template <class A>
void cell_forward(const CellWeights<A>& cell, const CellInputs<A>& in, A* out, bool output_only,
                  int threads);

// Gradients of one cell step from that of the new state, grad_out [slots, batch, channels], or of
// the output alone, [batch, channels], with `output_only`. Adds to grad_y [batch, channels],
// grad_state [slots, batch, channels] (to its row 0 with `first_sample`) and, unless these are
// `fresh_params` and only now get values, to grad_params. Nothing saved by the forward is needed.
// Threads as above.
template <class A>
void cell_backward(const CellWeights<A>& cell, const CellInputs<A>& in, const A* grad_out,
                   bool output_only, A* grad_y, A* grad_state,
                   A* const grad_params[kMaxCellParams], bool fresh_params, int threads);

}  // namespace dla::DLA_ISA
