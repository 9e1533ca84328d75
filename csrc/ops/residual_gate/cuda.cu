// Bound by memory: forward reads u and the shortcut and writes out, backward reads grad, u and out
// and writes du and dshortcut, each element once.
#include "ops/residual_gate/op.h"

#include "common/cuda/map.h"

namespace dla::cuda {
namespace residual_gate {

template <class T>
__global__ void __launch_bounds__(kThreads)
    join_kernel(Cut cut, const T* u, const Compute<T>* h, const T* shortcut, T* out) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  A factors[kPack<T>];
  load_factors(part, h, factors);
  for_packs<T, 2>(part, {u, shortcut}, [&](const Place& place, const Values<T, 2>& values) {
    A joined[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      const A sum = values[0][e] * factors[e] + values[1][e];
      joined[e] = sum < A(0) ? A(0) : sum;  // NaN stays
    }
    store(out, place, joined);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Cut cut, const T* grad, const T* u, const Compute<T>* h, const T* out, T* du,
                    Compute<T>* dh, T* dshortcut) {
  using A = Compute<T>;
  const Part<T> part(cut, blockIdx.x);
  A factors[kPack<T>], sums[kPack<T>] = {};
  load_factors(part, h, factors);
  for_packs<T, 3>(part, {grad, u, out}, [&](const Place& place, const Values<T, 3>& values) {
    A passed[kPack<T>], scaled[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      passed[e] = values[2][e] <= A(0) ? A(0) : values[0][e];
      scaled[e] = passed[e] * factors[e];
      sums[e] += passed[e] * values[1][e];
    }
    store(du, place, scaled);
    store(dshortcut, place, passed);
  });
  finish_sums(cut, part, sums, [&](Size plane, A total) { dh[plane] = total; });
}

template <class T>
Cut cut_maps(const ResidualGateInputs& args, bool sums, std::initializer_list<const void*> maps) {
  return cut_map<T>(args.batch, args.channels, args.area, args.channels_last, sums, maps);
}

Call call_of(const char* op, const ResidualGateInputs& args) {
  return {op, args.batch, args.channels, args.area, args.stream};
}

}  // namespace residual_gate

void residual_gate_forward(const ResidualGateForward& args) {
  using namespace residual_gate;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Cut cut = cut_maps<T>(args, false, {args.u, args.shortcut, args.out});
    launch(call_of("residual_gate", args), join_kernel<T>, {cut.blocks, kThreads}, cut,
           static_cast<const T*>(args.u), static_cast<const Compute<T>*>(args.h),
           static_cast<const T*>(args.shortcut), static_cast<T*>(args.out));
  });
}

void residual_gate_backward(const ResidualGateBackward& args) {
  using namespace residual_gate;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Cut cut = cut_maps<T>(args, true, {args.grad, args.u, args.out, args.du, args.dshortcut});
    launch(call_of("residual_gate_backward", args), gradient_kernel<T>, {cut.blocks, kThreads}, cut,
           static_cast<const T*>(args.grad), static_cast<const T*>(args.u),
           static_cast<const Compute<T>*>(args.h), static_cast<const T*>(args.out),
           static_cast<T*>(args.du), static_cast<Compute<T>*>(args.dh),
           static_cast<T*>(args.dshortcut));
  });
}

}  // namespace dla::cuda
