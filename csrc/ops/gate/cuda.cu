// Bound by memory: forward reads x and writes out, backward reads grad and x once and writes dx.
// One launch for a list of features, whose addresses travel as the kernel's arguments.
#include "ops/gate/op.h"

#include "common/cuda/map.h"

namespace dla::cuda {
namespace gate {

constexpr int kFeatures = 16;  // of one launch

// A feature, its gates, and what the pass makes of them. Null: not wanted.
template <class T>
struct Feature {
  const T *x, *grad;
  const Compute<T>* gates;
  T* out;
  Compute<T>* dgates;
  Cut cut;
  unsigned first_block;
};

template <class T>
struct Features {
  int count;
  Feature<T> of[kFeatures];

  // The feature that a block works on.
  __device__ const Feature<T>& at(unsigned block) const {
    int i = 0;
    while (i + 1 < count && block >= of[i + 1].first_block) ++i;
    return of[i];
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Features<T> list) {
  const Feature<T>& f = list.at(blockIdx.x);
  const Part<T> part(f.cut, blockIdx.x - f.first_block);
  Compute<T> gates[kPack<T>];
  load_factors(part, f.gates, gates);
  for_packs<T, 1>(part, {f.x}, [&](const Place& place, const Values<T, 1>& values) {
    Compute<T> out[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) out[e] = values[0][e] * gates[e];
    store(f.out, place, out);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const __grid_constant__ Features<T> list) {
  const Feature<T>& f = list.at(blockIdx.x);
  const Part<T> part(f.cut, blockIdx.x - f.first_block);
  Compute<T> gates[kPack<T>], sums[kPack<T>] = {};
  load_factors(part, f.gates, gates);
  for_packs<T, 2>(part, {f.grad, f.x}, [&](const Place& place, const Values<T, 2>& values) {
    Compute<T> dx[kPack<T>];
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      sums[e] += values[0][e] * values[1][e];
      dx[e] = values[0][e] * gates[e];
    }
    store(f.out, place, dx);
  });
  finish_sums(f.cut, part, sums, [&](Size plane, Compute<T> total) {
    f.dgates[plane] = total;
  });
}

// Calls the kernel for all features, kFeatures at a time; describe(i, feature) sets the pointers of
// one.
template <class T, class Describe>
void launch_lists(const char* op, void (*kernel)(Features<T>), const GateShapes& shapes, bool sums,
                  const Describe& describe) {
  const std::size_t total = shapes.area.size();
  for (std::size_t first = 0; first < total; first += kFeatures) {
    Features<T> list = {};
    list.count = static_cast<int>(std::min<std::size_t>(kFeatures, total - first));
    Size blocks = 0;
    for (int n = 0; n < list.count; ++n) {
      const std::size_t i = first + static_cast<std::size_t>(n);
      Feature<T>& f = list.of[n];
      describe(i, f);
      f.cut = cut_map<T>(shapes.batch[i], shapes.channels[i], shapes.area[i],
                         shapes.channels_last[i] != 0, sums, {f.x, f.grad, f.out});
      f.first_block = static_cast<unsigned>(blocks);
      blocks += f.cut.blocks;
    }
    const Call call{op, shapes.batch[first], shapes.channels[first], shapes.area[first],
                    shapes.stream};
    launch(call, kernel, {blocks, kThreads}, list);
  }
}

}  // namespace gate

void gate_forward(const GateForward& args) {
  using namespace gate;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    launch_lists<T>("gate", scale_kernel<T>, args, false, [&](std::size_t i, Feature<T>& f) {
      f.x = static_cast<const T*>(args.x[i]);
      f.gates = static_cast<const Compute<T>*>(args.gates[i]);
      f.out = static_cast<T*>(args.out[i]);
    });
  });
}

void gate_backward(const GateBackward& args) {
  using namespace gate;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    launch_lists<T>(
        "gate_backward", gradient_kernel<T>, args, true, [&](std::size_t i, Feature<T>& f) {
          f.x = static_cast<const T*>(args.x[i]);
          f.grad = static_cast<const T*>(args.grad[i]);
          f.gates = static_cast<const Compute<T>*>(args.gates[i]);
          f.out = static_cast<T*>(args.dx[i]);
          f.dgates = static_cast<Compute<T>*>(args.dgates[i]);
        });
  });
}

}  // namespace dla::cuda
