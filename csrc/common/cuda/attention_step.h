// What the steps of layer attention have in common, besides passes over maps.
#pragma once

#include "common/cuda/norm.h"
#include "common/cuda/numbers.h"
#include "common/cuda/scratch.h"
#include "ops/cell/tails.h"

namespace dla::cuda {

// What lies between o and out.
template <class A>
struct OutputNorm {
  ChannelNorm<A> norm;
  const A* drop_scale;  // [batch], or null
  bool relu = false;

  __device__ A drop(Size sample) const { return drop_scale == nullptr ? A(1) : drop_scale[sample]; }
};

// Gradients of the filters `to` [channels, 3, 3] from sums [9, rows, channels] or, with a second
// filter, [18, rows, channels]; of the latter times `factor` [channels].
template <class A>
__global__ void __launch_bounds__(kThreads)
    weight_gradients_kernel(Size rows, Size channels, const A* sums, A* to, A* second,
                            const A* factor) {
  constexpr int kTaps = 9;
  const Size field = field_of_block(channels), c = own_channel(channels);
  const A* of_field = sums + field * rows * channels;
  const double sum = add_rows(rows, channels, [&](Size, Size i) { return of_field[i]; });
  if (!writes_channel(channels)) return;
  if (field < kTaps)
    to[c * kTaps + field] = static_cast<A>(sum);
  else
    second[c * kTaps + field - kTaps] = static_cast<A>(factor[c] * sum);
}

// The gradient of the new state [slots, batch, channels]: what arrives (may be null), and what the
// evaluations that read it leave, [slots, rows, channels], `rows` a multiple of the batch. With
// `first_sample` all of these have read the first sample's.
template <class A>
__global__ void __launch_bounds__(kThreads)
    state_gradients_kernel(Size count, Size batch, Size channels, const A* arriving, Size rows,
                           const A* of_rows, bool first_sample, A* to) {
  const Size i = own_number(), planes = batch * channels;
  if (i >= count) return;
  const A* of_slot = of_rows + i / planes * rows * channels;
  const Size plane = i % planes, step = first_sample ? channels : planes;
  A sum = value_or_zero(arriving, i);
  if (!first_sample || plane < channels)
    for (Size at = plane; at < rows * channels; at += step) sum += of_slot[at];
  to[i] = sum;
}

// A step on the host. Features are of type T, all else of A.
template <class T, class Inputs>
struct AttentionStep {
  using A = Compute<T>;
  const Inputs& args;
  const Call call;
  Scratch<A> scratch{args.scratch};
  const Size area = args.height * args.width, planes = args.batch * args.channels;

  AttentionStep(const char* op, const Inputs& args)
      : args(args), call{op, args.batch, args.channels, args.height * args.width, args.stream} {}

  static const A* small(const void* p) { return static_cast<const A*>(p); }
  static A* small(void* p) { return static_cast<A*>(p); }
  static const T* map(const void* p) { return static_cast<const T*>(p); }
  static T* map(void* p) { return static_cast<T*>(p); }

  bool dynamic() const { return !args.cell_params.empty(); }
  DType compute_type() const { return sizeof(A) == 8 ? DType::f64 : DType::f32; }
  int slots() const {
    if (!dynamic()) return 0;
    return with_tail(args.cell, [](auto tail) { return decltype(tail)::layout.slots; });
  }

  ChannelNorm<A> channel_norm(const void* mean, const void* var) const {
    const bool none = args.norm == Norm::none;
    return {small(args.norm_weight), small(args.norm_bias), none ? nullptr : small(mean),
            none ? nullptr : small(var), args.eps};
  }

  void evaluate_cell(const void* y, const void* state, Size rows, void* out,
                     bool first_sample = false) const {
    const CellForward cell{y, state, args.cell_params, out, rows, args.channels, args.hidden,
                           args.cell, args.activation, compute_type(), args.threads, args.stream,
                           first_sample};
    cell_forward(cell);
  }

  // With `add_params` the gradients of the parameters are added to those that are there.
  void differentiate_cell(const void* grad, const void* y, const void* state, Size rows,
                          void* grad_y, void* grad_of_state, const std::vector<void*>& grad_params,
                          void* memory, bool add_params, bool first_sample = false) const {
    const CellBackward cell{grad, y, state, args.cell_params, grad_y, grad_of_state, grad_params,
                            memory, rows, args.channels, args.hidden, args.cell, args.activation,
                            compute_type(), args.threads, args.stream, first_sample, add_params};
    cell_backward(cell);
  }
};

}  // namespace dla::cuda
