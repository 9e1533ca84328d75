// Kernels with a mistake each, and one without: does the emulation notice? Run by test_emulation.py
// with the name of a kernel; prints the results, or what was noticed.
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "common/cuda/launch.h"

using namespace dla::cuda;

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
    const Grid grid{kBlocks, kThreads, kThreads * sizeof(float)};
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
