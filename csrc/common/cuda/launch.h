// How host code starts a kernel: on the caller's stream, without waiting, and without anything that
// could not be captured in a CUDA graph.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda/device.h"

namespace dla::cuda {

// What a launch is for, should it fail: the op and the sizes of its first tensor.
struct Call {
  const char* op;
  std::int64_t batch, channels, area;
  void* stream;

  std::string text() const {
    return std::string(op) + " on [batch " + std::to_string(batch) + ", channels " +
           std::to_string(channels) + ", area " + std::to_string(area) + "]";
  }
};

// A grid in one dimension.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t shared_bytes = 0;
};

#ifdef DLA_CUDA_EMULATED

template <class... P>
void start(const Call&, void (*kernel)(P...), const Grid& grid, P... args) {
  emulation::Machine::instance().run({static_cast<unsigned>(grid.blocks)},
                                     {static_cast<unsigned>(grid.threads)}, grid.shared_bytes,
                                     [=] { kernel(args...); });
}

inline std::size_t most_shared_bytes(const Call&) { return emulation::kMostSharedBytes; }

#else

inline const char* remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "the kernels were not built for this GPU: reinstall with its architecture in "
             "DLA_CUDA_ARCHS (pip install .)";
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice: return "install a newer NVIDIA driver";
    default:
      return "an earlier kernel may be the cause: run with CUDA_LAUNCH_BLOCKING=1; "
             "dla_kernels.use_backend('triton') or 'reference' does without this kernel";
  }
}

inline void check(cudaError_t error, const Call& call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(call.text() + ": " + cudaGetErrorString(error) + "; " + remedy(error));
}

// Shared memory that a block may ask for on the current GPU.
inline std::size_t most_shared_bytes(const Call& call) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), call);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), call);
  return static_cast<std::size_t>(bytes);
}

// Without asking, a block has 48 KB of shared memory for what its kernel declares and what the
// launch adds. Asks for all there is, once: a limit that followed each launch could fall below what
// another host thread is about to use.
inline void ask_for_shared_memory(const Call& call, const void* function, std::size_t bytes) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  cudaFuncAttributes kernel{};
  check(cudaFuncGetAttributes(&kernel, function), call);
  const std::size_t declared = kernel.sharedSizeBytes;
  if (declared + bytes <= kWithoutAsking) return;
  const auto wanted = static_cast<int>(std::max(most_shared_bytes(call) - declared, bytes));
  if (kernel.maxDynamicSharedSizeBytes < wanted)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted),
          call);
}

template <class... P>
void start(const Call& call, void (*kernel)(P...), const Grid& grid, P... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 0) ask_for_shared_memory(call, function, grid.shared_bytes);
  void* addresses[] = {&args...};
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid.blocks)),
                         dim3(static_cast<unsigned>(grid.threads)), addresses, grid.shared_bytes,
                         static_cast<cudaStream_t>(call.stream)),
        call);
}

#endif

// Starts kernel(args...) with grid.blocks times grid.threads threads.
template <class... P>
void launch(const Call& call, void (*kernel)(P...), const Grid& grid,
            std::common_type_t<P>... args) {
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  if (grid.blocks < 1 || grid.blocks > kMostBlocks)
    throw std::runtime_error(call.text() + ": too large for one launch; split the batch");
  start<P...>(call, kernel, grid, args...);
}

}  // namespace dla::cuda
