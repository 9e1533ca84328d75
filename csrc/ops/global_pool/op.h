// global_pool: mean over the area of [batch, channels, area] (NCHW) or [batch, area, channels]
// (channels_last) features. Pooled values are in the compute type.
#pragma once

#include "common/args.h"
#include "common/isa.h"

namespace dla {

struct GlobalPoolForward {
  const void* x;
  void* out;  // [batch, channels]
  std::int64_t batch, channels, area;
  DType dtype;
  bool channels_last;
  int threads;
  void* stream = nullptr;  // cudaStream_t
};

struct GlobalPoolBackward {
  const void* grad;  // [batch, channels]
  void* dx;          // like x
  std::int64_t batch, channels, area;
  DType dtype;
  bool channels_last;
  int threads;
  void* stream = nullptr;  // cudaStream_t
};

}  // namespace dla

DLA_CPU_ENTRY(global_pool_forward, GlobalPoolForward)
DLA_CPU_ENTRY(global_pool_backward, GlobalPoolBackward)
DLA_CUDA_ENTRY(global_pool_forward, GlobalPoolForward)
DLA_CUDA_ENTRY(global_pool_backward, GlobalPoolBackward)
