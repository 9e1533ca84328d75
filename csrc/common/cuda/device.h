// What kernels are written with: element types, 16-byte accesses, shared memory, sums over lanes.
// Included in .cu files only. nvcc compiles them for GPUs; the tests compile the same sources as
// C++ against tests/emulation/cuda_emulation.h, which knows no more of CUDA than is used so far.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifdef DLA_CUDA_EMULATED
#include "cuda_emulation.h"
// Arrays in shared memory, `T name[count]`, and the dynamic shared memory of a launch.
#define DLA_SHARED(T, name, count)                           \
  static thread_local emulation::SharedMemory name##_memory; \
  const auto name = emulation::declared_shared<T>(name##_memory, count)
#define DLA_DYNAMIC_SHARED(T, name) const auto name = emulation::dynamic_shared<T>()
#else
#define DLA_SHARED(T, name, count) __shared__ T name[count]
#define DLA_DYNAMIC_SHARED(T, name)             \
  extern __shared__ uint4 dla_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dla_dynamic_shared)
#endif

#define DLA_ISA cuda  // headers that CPU kernels use, too, put what is in them into dla::cuda

namespace dla::cuda {

using Size = std::int64_t;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef DLA_CUDA_EMULATED
template <class T>
using Shared = emulation::Shared<T>;
#else
template <class T>
using Shared = T*;
#endif

// ---- element types ------------------------------------------------------------------------------

__device__ inline float to_compute(float v) { return v; }
__device__ inline double to_compute(double v) { return v; }

__device__ inline float to_compute(BFloat16 v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

__device__ inline float to_compute(Half v) {
#ifdef DLA_CUDA_EMULATED
  return static_cast<float>(std::bit_cast<_Float16>(v.bits));
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#endif
}

__device__ inline void from_compute(float v, float& out) { out = v; }
__device__ inline void from_compute(double v, double& out) { out = v; }

__device__ inline void from_compute(float v, BFloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  std::uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<std::uint16_t>(
      nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

__device__ inline void from_compute(float v, Half& out) {
#ifdef DLA_CUDA_EMULATED
  out.bits = std::bit_cast<std::uint16_t>(static_cast<_Float16>(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#endif
}

// 1 / sqrt(v), in float to within 2 units of the last place.
__device__ inline float inverse_sqrt(float v) {
#ifdef DLA_CUDA_EMULATED
  return 1 / std::sqrt(v);
#else
  return rsqrtf(v);
#endif
}
__device__ inline double inverse_sqrt(double v) { return 1 / std::sqrt(v); }

// ---- 16 bytes -----------------------------------------------------------------------------------

// Elements in 16 bytes, the most that a thread reads or writes at once.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Pack {
  T of[kPack<T>];
};

// Written out as instructions: a plain copy may be taken apart. What a kernel reads this way it
// must not write.
template <class T>
__device__ inline Pack<T> load_pack(const T* p) {
  Pack<T> pack;
#ifdef DLA_CUDA_EMULATED
  emulation::check_aligned(p);
  memcpy(&pack, p, sizeof pack);
#else
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
  memcpy(&pack, &bits, sizeof pack);
#endif
  return pack;
}

template <class T>
__device__ inline void store_pack(T* p, const Pack<T>& pack) {
#ifdef DLA_CUDA_EMULATED
  emulation::check_aligned(p);
  memcpy(p, &pack, sizeof pack);
#else
  uint4 bits;
  memcpy(&bits, &pack, sizeof bits);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(p), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w) : "memory");
#endif
}

// From global to shared memory, on its way until wait_for_packs; the block's barrier comes then.
template <class T>
__device__ inline void copy_pack(const T* from, Shared<T> to) {
#ifdef DLA_CUDA_EMULATED
  emulation::check_aligned(from);
  emulation::check_aligned(to.address());
  to.copy(from);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :: "r"(address), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = __ldg(reinterpret_cast<const uint4*>(from));
#endif
}

__device__ inline void wait_for_packs() {
#ifdef DLA_CUDA_EMULATED
  emulation::wait_for_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <class T>
__device__ inline Pack<T> shared_pack(Shared<T> from) {
  Pack<T> pack;
#ifdef DLA_CUDA_EMULATED
  emulation::check_aligned(from.address());
  for (int e = 0; e < kPack<T>; ++e) pack.of[e] = from[e];
#else
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  memcpy(&pack, &bits, sizeof pack);
#endif
  return pack;
}

// ---- sums ---------------------------------------------------------------------------------------

// Sum over groups of `lanes` neighbouring lanes (a power of two, at most a warp), whose members are
// `step` lanes apart; all lanes of the warp take part, and all get the sum of their group.
template <class A>
__device__ inline A sum_lanes(A value, int lanes, int step = 1) {
  for (int distance = step; distance < lanes * step; distance *= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

}  // namespace dla::cuda
