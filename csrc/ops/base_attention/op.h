// One DLA-B layer step in one call: value, cell, gates and scores of all layers, their weighted sum,
// normalisation, residual. dla_kernels/ops/base_attention/README.md has the mathematics.
#pragma once

#include <cstdint>
#include <vector>

#include "common/args.h"
#include "common/isa.h"
#include "ops/cell/op.h"

namespace dla {

// What forward and backward share, with T earlier layers. Features (x, values, out, v, g and the
// gradients of features) are dense, of type `dtype`, in one memory format; everything else is dense
// and of the compute type. Optional tensors are null, lists that do not apply empty.
struct BaseAttentionInputs {
  const void* x;                                 // [B, C, H, W]
  std::vector<const void*> values;               // T like x
  const void* state;                             // [S, B, C]
  const void *keys, *gates;                      // [T, B, C]; null: see gated_features; static
  std::vector<const void*> pooled;               // T of [B, C]
  std::vector<const void*> cell_params;          // empty: static attention, all gates 1
  const void *q_weight, *k_weight;               // [kernel_size]
  std::vector<const void*> key_weights;          // T of [kernel_size] with gated_features
  const void* v_weight;                          // [C, 3, 3]
  const void *norm_weight, *norm_bias;           // [C]
  const void* drop_scale;                        // [B]
  std::int64_t batch, channels, height, width, head_dim, kernel_size, hidden;
  DType dtype;
  CellKind cell;
  Activation activation;
  Norm norm;
  bool channels_last, sigmoid_gate, first_sample, relu, residual;
  bool gated_features;  // keys are made of gated pooled features instead of being gated themselves
  double eps;
  int threads;
  void* stream = nullptr;   // cudaStream_t
  void* scratch = nullptr;  // CUDA: base_attention_*_scratch elements of the compute type
};

struct BaseAttentionForward : BaseAttentionInputs {
  const void *mean_in, *var_in;   // [C], norm running
  void *out, *v;                  // like x; v null: no later layer wants it
  void* state_out;                // [S, B, C]
  void *keys_out, *gates_out;     // [T + 1, B, C]; null where keys and gates are
  void *pooled_v;                 // [B, C]; null: not wanted
  void* scores;                   // [T + 1, B, C / head_dim]
  void *mean, *var;               // [C], norm batch
  void* pooled_x;                 // [B, C]
};

struct BaseAttentionBackward : BaseAttentionInputs {
  const void *grad_out, *grad_v, *grad_state, *grad_keys, *grad_gates;  // each may be null
  const void* grad_pooled_v;                                            // [B, C] or null
  const void* grad_pooled_x;                                            // [B, C] or null
  std::vector<const void*> later_grads, later_weights;  // of later layers: their g and [B, C]
  const void *mean, *var, *scores, *pooled_x;           // as the forward step had them
  void* dx;
  void* g;        // gradient of the weighted sum, like x; null without grad_out
  void* weights;  // [T + 1, B, C]: the factors of the values
  void* dv;       // CUDA: working memory like x; null with less than two terms of the gradient of v
  void *dstate, *dkeys, *dgates;
  std::vector<void*> dpooled, dcell_params;
  void *dq_weight, *dk_weight;
  std::vector<void*> dkey_weights;
  void *dv_weight, *dnorm_weight, *dnorm_bias;
};

}  // namespace dla

DLA_CPU_ENTRY(base_attention_forward, BaseAttentionForward)
DLA_CPU_ENTRY(base_attention_backward, BaseAttentionBackward)
DLA_CUDA_ENTRY(base_attention_forward, BaseAttentionForward)
DLA_CUDA_ENTRY(base_attention_backward, BaseAttentionBackward)

namespace dla::cuda {

// The working memory that a call needs, whose own `scratch` is not looked at.
std::int64_t base_attention_forward_scratch(const BaseAttentionForward& args);
std::int64_t base_attention_backward_scratch(const BaseAttentionBackward& args);

}  // namespace dla::cuda
