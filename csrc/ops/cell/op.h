// Recurrent cells: arguments of the entry points. The mathematics is in README.md of the Python
// package's ops/cell.
#pragma once

#include <cstdint>
#include <vector>

#include "common/args.h"
#include "common/isa.h"

namespace dla {

// In the order of CELLS in the Python package's ops/cell/reference.py.
enum class CellKind : int { dsu, dsu_split, dia, lstm, rnn };
enum class Activation : int { sigmoid = 0, tanh = 1, relu = 2, identity = 3 };

constexpr int kMaxCellParams = 8;

// All arrays dense, of type `dtype`: f32 or f64 (the compute types).
struct CellForward {
  const void* y;                    // [batch, channels]
  const void* state;                // [slots, batch, channels]
  std::vector<const void*> params;  // in the order of the kind
  void* out;                        // [slots, batch, channels]
  std::int64_t batch, channels, hidden;
  CellKind kind;
  Activation activation;
  DType dtype;
  int threads;
  void* stream = nullptr;     // cudaStream_t
  bool first_sample = false;  // CUDA: every row reads row 0 of the state
};

struct CellBackward {
  const void* grad_out;  // [slots, batch, channels]
  const void* y;
  const void* state;
  std::vector<const void*> params;
  void* grad_y;                    // written, as all gradients
  void* grad_state;
  std::vector<void*> grad_params;
  void* scratch;                   // CUDA: batch * (5 channels + 4 hidden) elements
  std::int64_t batch, channels, hidden;
  CellKind kind;
  Activation activation;
  DType dtype;
  int threads;
  void* stream = nullptr;  // cudaStream_t
  // CUDA: every row reads row 0 of the state, and grad_state has the share of each in it.
  bool first_sample = false;
  bool add_params = false;  // CUDA: grad_params has gradients to which others are added
};

}  // namespace dla

DLA_CPU_ENTRY(cell_forward, CellForward)
DLA_CPU_ENTRY(cell_backward, CellBackward)
DLA_CUDA_ENTRY(cell_forward, CellForward)
DLA_CUDA_ENTRY(cell_backward, CellBackward)
