// What the argument structs of all ops are made of.
#pragma once

#include <cstdint>
#include <vector>

namespace dla {

// Element type of feature maps. Everything small (pooled values, states, parameters) is in the
// compute type: double for f64, float for the others.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Statistics that a layer step normalises with.
enum class Norm : int { none = 0, batch = 1, running = 2 };

}  // namespace dla

// Of small functions that GPU code calls, too.
#ifdef __CUDACC__
#define DLA_HOST_DEVICE __host__ __device__
#else
#define DLA_HOST_DEVICE
#endif

// Declares the CUDA version of an entry point, which ops/<op>/cuda.cu defines.
#define DLA_CUDA_ENTRY(name, Args) \
  namespace dla::cuda { void name(const Args&); }
