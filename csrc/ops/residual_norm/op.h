// residual_norm: out = relu(norm(x) + shortcut), norm a batch norm over channels. Maps are dense, of
// type `dtype`, in one memory format; the rest is [channels], in the compute type.
#pragma once

#include <cstdint>

#include "common/args.h"
#include "common/isa.h"

namespace dla {

struct ResidualNormInputs {
  const void* x;                // [batch, channels, height, width]
  const void *weight, *bias;    // null: 1 and 0
  std::int64_t batch, channels, height, width;
  bool channels_last;
  DType dtype;
  Norm norm;  // batch or running
  double eps;
  int threads;
  // For CUDA alone: a stream (cudaStream_t), working memory of (2 batch pieces + 3) channels
  // elements of the compute type, and how many blocks share the pixels of a sample (channels_last).
  void* stream = nullptr;
  void* scratch = nullptr;
  std::int64_t pieces = 1;
};

struct ResidualNormForward : ResidualNormInputs {
  const void* shortcut;
  const void *mean_in, *var_in;  // norm running
  void* out;
  void *mean, *var;  // norm batch
};

struct ResidualNormBackward : ResidualNormInputs {
  const void *grad, *out;
  const void *mean, *var;  // that the forward step normalised with
  void *dx, *dshortcut, *dweight, *dbias;
};

}  // namespace dla

DLA_CPU_ENTRY(residual_norm_forward, ResidualNormForward)
DLA_CPU_ENTRY(residual_norm_backward, ResidualNormBackward)
DLA_CUDA_ENTRY(residual_norm_forward, ResidualNormForward)
DLA_CUDA_ENTRY(residual_norm_backward, ResidualNormBackward)
