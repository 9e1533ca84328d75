// residual_gate: out = relu(u * h + shortcut), one factor h per sample and channel. Maps lie
// [batch, channels, area] (NCHW) or [batch, area, channels] (channels_last); h is [batch, channels]
// in the compute type.
#pragma once

#include <cstdint>

#include "common/args.h"
#include "common/isa.h"

namespace dla {

struct ResidualGateInputs {
  const void *u, *h;
  std::int64_t batch, channels, area;
  bool channels_last;
  DType dtype;
  int threads;
  void* stream = nullptr;  // cudaStream_t
};

struct ResidualGateForward : ResidualGateInputs {
  const void* shortcut;
  void* out;
};

struct ResidualGateBackward : ResidualGateInputs {
  const void *grad, *out;
  void *du, *dh, *dshortcut;
};

}  // namespace dla

DLA_CPU_ENTRY(residual_gate_forward, ResidualGateForward)
DLA_CPU_ENTRY(residual_gate_backward, ResidualGateBackward)
DLA_CUDA_ENTRY(residual_gate_forward, ResidualGateForward)
DLA_CUDA_ENTRY(residual_gate_backward, ResidualGateBackward)
