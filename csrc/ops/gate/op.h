// gate: x * d, one factor per sample and channel, for a list of features of one type. Features lie
// [batch, channels, area] (NCHW) or [batch, area, channels] (channels_last); factors are
// [batch, channels] in the compute type.
#pragma once

#include <cstdint>
#include <vector>

#include "common/args.h"
#include "common/isa.h"

namespace dla {

// All vectors have one entry per feature.
struct GateShapes {
  std::vector<std::int64_t> batch, channels, area;
  std::vector<int> channels_last;
  DType dtype;
  int threads;
  void* stream = nullptr;  // cudaStream_t
};

struct GateForward : GateShapes {
  std::vector<const void*> x, gates;
  std::vector<void*> out;
};

struct GateBackward : GateShapes {
  std::vector<const void*> grad, x, gates;
  std::vector<void*> dx, dgates;
};

}  // namespace dla

DLA_CPU_ENTRY(gate_forward, GateForward)
DLA_CPU_ENTRY(gate_backward, GateBackward)
DLA_CUDA_ENTRY(gate_forward, GateForward)
DLA_CUDA_ENTRY(gate_backward, GateBackward)
