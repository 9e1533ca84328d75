// Kernels with a mistake each, and one without: does the emulation notice? Run by test_emulation.py
// with the name of a kernel; prints the results, or what was noticed.
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "common/cuda/launch.h"

using namespace dla::cuda;
using dla::Half;

namespace {

constexpr int kThreads = 64, kBlocks = 3;

// Sum of the block's numbers, in shared memory.
__global__ void healthy(const float* x, float* out) {
  DLA_SHARED(float, of_warps, kThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const float sum = sum_lanes(x[block * kThreads + thread], kWarp);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = sum;
  __syncthreads();
  if (thread == 0) out[block] = of_warps[0] + of_warps[1];
}

__global__ void no_barrier(const float* x, float* out) {
  DLA_SHARED(float, of_warps, kThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const float sum = sum_lanes(x[block * kThreads + thread], kWarp);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = sum;
  if (thread == 0) out[block] = of_warps[0] + of_warps[1];
}

// Dynamic shared memory that is written again while others may still read it.
__global__ void barrier_forgotten_in_a_loop(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int block = 0; block < kBlocks; ++block) {
    numbers[thread] = x[block * kThreads + thread];
    __syncthreads();
    sum += numbers[kThreads - 1 - thread];
  }
  if (thread == 0) out[blockIdx.x] = sum;
}

// The same with a barrier among the lanes of a warp, which is enough for them.
__global__ void warps_on_their_own(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  float sum = 0;
  for (int block = 0; block < kBlocks; ++block) {
    numbers[thread] = x[block * kThreads + thread];
    __syncwarp();
    sum += numbers[thread - lane + kWarp - 1 - lane];
    __syncwarp();
  }
  if (thread == 0) out[blockIdx.x] = sum;
}

__global__ void no_warp_barrier(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  numbers[thread] = x[thread];
  const float other = numbers[thread - lane + kWarp - 1 - lane];
  if (thread == 0) out[blockIdx.x] = other;
}

__global__ void shared_out_of_bounds(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  const int thread = static_cast<int>(threadIdx.x);
  numbers[thread + 1] = x[thread];
  if (thread == 0) out[blockIdx.x] = numbers[1];
}

__global__ void shared_never_written(const float*, float* out) {
  DLA_SHARED(float, numbers, kThreads);
  if (threadIdx.x == 0) out[blockIdx.x] = numbers[1];
}

// Half of the dynamic shared memory is for floats; halves come then, from `first` on.
__device__ void two_types(const float* x, float* out, int first) {
  DLA_DYNAMIC_SHARED(float, numbers);
  DLA_DYNAMIC_SHARED(Half, halves);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kThreads / 2) {
    numbers[thread] = x[thread];
    Half half;
    from_compute(x[kThreads + thread], half);
    halves[first + thread] = half;
  }
  __syncthreads();
  if (thread == 0) out[blockIdx.x] = numbers[5] + to_compute(static_cast<Half>(halves[first + 6]));
}

__global__ void types_side_by_side(const float* x, float* out) { two_types(x, out, kThreads); }
__global__ void types_overlap(const float* x, float* out) { two_types(x, out, kThreads - 1); }

__global__ void more_declared_than_there_is(const float* x, float* out) {
  DLA_SHARED(float, numbers, 80000 / sizeof(float));
  numbers[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) out[blockIdx.x] = numbers[0];
}

// Healthy, were it not for the dynamic shared memory that main asks for.
__global__ void more_shared_than_there_is(const float* x, float* out) { healthy(x, out); }

// The declared array alone would do.
__global__ void more_shared_in_all(const float* x, float* out) {
  DLA_SHARED(float, numbers, 40000 / sizeof(float));
  numbers[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) out[blockIdx.x] = numbers[0];
}

// Asynchronous copies of the block's numbers, with what it takes to read those of other threads.
__device__ void start_copies(const float* x, Shared<float> numbers) {
  const int at = static_cast<int>(threadIdx.x) * kPack<float>;
  if (at < kThreads) copy_pack(x + static_cast<int>(blockIdx.x) * kThreads + at, numbers + at);
}
__device__ void write_copied(Shared<float> numbers, float* out) {
  if (threadIdx.x == kThreads - 1) out[blockIdx.x] = shared_pack<float>(numbers + 8).of[1];
}

__global__ void copies(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  wait_for_packs();
  __syncthreads();
  write_copied(numbers, out);
}

__global__ void copy_without_wait(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  __syncthreads();
  write_copied(numbers, out);
}

__global__ void own_copy_without_wait(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  if (threadIdx.x == 0) out[blockIdx.x] = numbers[0];
}

__global__ void copy_without_barrier(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  wait_for_packs();
  write_copied(numbers, out);
}

__global__ void barrier_before_the_wait(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  __syncthreads();
  wait_for_packs();
  write_copied(numbers, out);
}

__global__ void written_while_copied(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  start_copies(x, numbers);
  if (threadIdx.x == 0) numbers[1] = 0;
  wait_for_packs();
  __syncthreads();
  write_copied(numbers, out);
}

__global__ void copy_to_unaligned(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  if (threadIdx.x == 0) copy_pack(x, numbers + 2);
  wait_for_packs();
  __syncthreads();
  if (threadIdx.x == 1) out[blockIdx.x] = numbers[2];
}

__global__ void unaligned_shared(const float* x, float* out) {
  DLA_DYNAMIC_SHARED(float, numbers);
  numbers[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = shared_pack<float>(numbers + 2).of[0];
}

__global__ void global_out_of_bounds(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = x[kBlocks * kThreads + blockIdx.x];
}

__global__ void unaligned(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = load_pack(x + 1 + blockIdx.x).of[0];
}

// Half of the warp does not come.
__global__ void lanes_missing(const float* x, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % kWarp < 16) {
    const float sum = __shfl_xor_sync(kAllLanes, x[thread], 1);
    if (thread == 0) out[blockIdx.x] = sum;
  }
}

__global__ void lane_not_in_its_mask(const float* x, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const float sum = __shfl_xor_sync(0xffffu, x[thread], 1);
  if (thread == 0) out[blockIdx.x] = sum;
}

__global__ void source_not_in_the_mask(const float* x, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % kWarp < 16) {
    const float sum = __shfl_xor_sync(0xffffu, x[thread], 16);
    if (thread == 0) out[blockIdx.x] = sum;
  }
}

// Half a warp with the mask that says so: fine.
__global__ void half_a_warp(const float* x, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % kWarp < 16) {
    const float other = __shfl_xor_sync(0xffffu, x[thread], 8);
    const bool all = __ballot_sync(0xffffu, thread % 2) == 0xaaaau;
    if (thread == 0) out[blockIdx.x] = all ? other : -1;
  }
}

__global__ void barrier_not_reached_by_all(const float* x, float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = x[0];
}

// Blocks that overwrite each other's result in global memory: it depends on their order.
__global__ void last_block_wins(const float*, float* out) {
  if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}

using Kernel = void (*)(const float*, float*);
const std::map<std::string, Kernel> kernels = {
    {"healthy", healthy},
    {"no_barrier", no_barrier},
    {"barrier_forgotten_in_a_loop", barrier_forgotten_in_a_loop},
    {"warps_on_their_own", warps_on_their_own},
    {"no_warp_barrier", no_warp_barrier},
    {"shared_out_of_bounds", shared_out_of_bounds},
    {"shared_never_written", shared_never_written},
    {"types_side_by_side", types_side_by_side},
    {"types_overlap", types_overlap},
    {"more_declared_than_there_is", more_declared_than_there_is},
    {"more_shared_than_there_is", more_shared_than_there_is},
    {"more_shared_in_all", more_shared_in_all},
    {"copies", copies},
    {"copy_without_wait", copy_without_wait},
    {"own_copy_without_wait", own_copy_without_wait},
    {"copy_without_barrier", copy_without_barrier},
    {"barrier_before_the_wait", barrier_before_the_wait},
    {"written_while_copied", written_while_copied},
    {"copy_to_unaligned", copy_to_unaligned},
    {"unaligned_shared", unaligned_shared},
    {"global_out_of_bounds", global_out_of_bounds},
    {"unaligned", unaligned},
    {"lanes_missing", lanes_missing},
    {"lane_not_in_its_mask", lane_not_in_its_mask},
    {"source_not_in_the_mask", source_not_in_the_mask},
    {"half_a_warp", half_a_warp},
    {"barrier_not_reached_by_all", barrier_not_reached_by_all},
    {"last_block_wins", last_block_wins},
};

}  // namespace

int main(int, char** arguments) {
  const auto x = std::make_unique<float[]>(kBlocks * kThreads);
  const auto out = std::make_unique<float[]>(kBlocks);
  for (int i = 0; i < kBlocks * kThreads; ++i) x[i] = static_cast<float>(i);
  const Call call{arguments[1], 1, 1, 1, nullptr};
  const auto run = [&](const std::string& name) {
    std::size_t shared_bytes = kThreads * sizeof(float);
    if (name == "more_shared_than_there_is") shared_bytes = 500000;
    if (name == "more_shared_in_all") shared_bytes = 30000;
    const Grid grid{kBlocks, kThreads, shared_bytes};
    launch(call, kernels.at(name), grid, x.get(), out.get());
  };
  try {
    run(arguments[1]);
  } catch (const std::logic_error& error) {
    std::puts(error.what());
    run("healthy");  // a failure leaves nothing behind
    return 1;
  }
  for (int block = 0; block < kBlocks; ++block) std::printf("%g ", out[block]);
}
