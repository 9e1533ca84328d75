// One DLA-L layer step in one call: pooling, cell, scores, stencil, normalisation, residual.
// dla_kernels/ops/light_attention/README.md has the mathematics and the cost of each pass.
#pragma once

#include <cstdint>
#include <vector>

#include "common/args.h"
#include "common/isa.h"
#include "ops/cell/op.h"

namespace dla {

// What forward and backward share. Features (x, p, out, o and their gradients) are dense, of type
// `dtype`, in one memory format; everything else is dense and of the compute type. Optional
// tensors are null.
struct LightAttentionInputs {
  const void *x, *p;                                  // [B, C, H, W]
  const void* state;                                  // [S, B, C]
  std::vector<const void*> cell_params;               // empty: static attention, d = 1
  const void *q_weight, *k_weight;                    // [kernel_size]
  const void *v_weight, *prev_weight;                 // [C, 3, 3]
  const void *lam, *norm_weight, *norm_bias;          // [C]
  const void *branch_weight, *branch_bias;            // [C]
  const void* drop_scale;                             // [B]
  std::int64_t batch, channels, height, width, head_dim, kernel_size, hidden;
  DType dtype;
  CellKind cell;
  Activation activation;
  Norm norm, branch_norm;
  bool channels_last, sigmoid_gate, first_sample, residual;
  bool join;  // ReLU(branch_norm(x) + p) takes the place of x
  double eps, branch_eps;
  int threads;
  void* stream = nullptr;   // cudaStream_t
  void* scratch = nullptr;  // CUDA: light_attention_*_scratch elements of the compute type
};

struct LightAttentionForward : LightAttentionInputs {
  const void *mean_in, *var_in, *branch_mean_in, *branch_var_in;  // [C], norm running
  void *out, *o;                 // [B, C, H, W]; o may be null
  void* new_state;               // [S, B, C]; null when static
  void *mean, *var, *branch_mean, *branch_var;                    // [C], norm batch
  void* summary;                 // [12 or 4, B, C]: SummaryField of plane_sums.h
};

struct LightAttentionBackward : LightAttentionInputs {
  const void *grad_out, *grad_o, *grad_state;  // each may be null
  // That the forward step normalised with.
  const void *mean, *var, *branch_mean, *branch_var;
  const void *new_state, *summary;             // as the forward step made them
  void *dx, *dp;                               // dp null: not wanted
  void* dstate;                                // [S, B, C]; null when static
  void *dq_weight, *dk_weight, *dv_weight, *dprev_weight, *dlam, *dnorm_weight, *dnorm_bias;
  void *dbranch_weight, *dbranch_bias;
  std::vector<void*> dcell_params;
};

}  // namespace dla

DLA_CPU_ENTRY(light_attention_forward, LightAttentionForward)
DLA_CPU_ENTRY(light_attention_backward, LightAttentionBackward)
DLA_CUDA_ENTRY(light_attention_forward, LightAttentionForward)
DLA_CUDA_ENTRY(light_attention_backward, LightAttentionBackward)

namespace dla::cuda {

// The working memory that a call needs, whose own `scratch` is not looked at.
std::int64_t light_attention_forward_scratch(const LightAttentionForward& args);
std::int64_t light_attention_backward_scratch(const LightAttentionBackward& args);

}  // namespace dla::cuda
