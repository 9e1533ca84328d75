// Bound by memory: every feature element is read (or written) once.
#include "ops/global_pool/op.h"

#include "common/cuda/map.h"

namespace dla::cuda {
namespace global_pool {

template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(Cut cut, const T* x, Compute<T>* out) {
  const Part<T> part(cut, blockIdx.x);
  Compute<T> sums[kPack<T>] = {};
  for_packs<T, 1>(part, {x}, [&](const Place&, const Values<T, 1>& values) {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) sums[e] += values[0][e];
  });
  finish_sums(cut, part, sums, [&](Size plane, Compute<T> total) {
    out[plane] = total / static_cast<Compute<T>>(cut.area);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(Cut cut, const Compute<T>* grad, T* dx) {
  const Part<T> part(cut, blockIdx.x);
  Compute<T> shares[kPack<T>];
  load_factors(part, grad, shares);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) shares[e] /= static_cast<Compute<T>>(cut.area);
  for_places(part, [&](const Place& place) { store(dx, place, shares); });
}

template <class Args>
Call call_of(const char* op, const Args& args) {
  return {op, args.batch, args.channels, args.area, args.stream};
}

}  // namespace global_pool

void global_pool_forward(const GlobalPoolForward& args) {
  using namespace global_pool;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Cut cut = cut_map<T>(args.batch, args.channels, args.area, args.channels_last, true,
                               {args.x});
    launch(call_of("global_pool", args), mean_kernel<T>, {cut.blocks, kThreads}, cut,
           static_cast<const T*>(args.x), static_cast<Compute<T>*>(args.out));
  });
}

void global_pool_backward(const GlobalPoolBackward& args) {
  using namespace global_pool;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const Cut cut = cut_map<T>(args.batch, args.channels, args.area, args.channels_last, false,
                               {args.dx});
    launch(call_of("global_pool_backward", args), spread_kernel<T>, {cut.blocks, kThreads}, cut,
           static_cast<const Compute<T>*>(args.grad), static_cast<T*>(args.dx));
  });
}

}  // namespace dla::cuda
