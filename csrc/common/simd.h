// Vectors of the compute type (float or double) at the width of the instruction set this file is
// compiled for, with loads and stores that convert from and to the feature types.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "args.h"

namespace dla::DLA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage-only feature types: arithmetic happens in Compute<T>.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E)), may_alias));
};
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// ---- scalar conversions ------------------------------------------------------------------------

inline float to_compute(float v) { return v; }
inline double to_compute(double v) { return v; }
inline float to_compute(BFloat16 v) {
  std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float to_compute(Half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const std::uint32_t exponent_mantissa = v.bits & 0x7fffu;
  std::uint32_t bits;
  if (exponent_mantissa >= 0x7c00u) {  // infinity or NaN
    bits = sign | 0x7f800000u | ((exponent_mantissa & 0x3ffu) << 13);
  } else if (exponent_mantissa >= 0x400u) {  // normal
    bits = sign | ((exponent_mantissa << 13) + 0x38000000u);
  } else {  // subnormal or zero: exact as a float product
    float magnitude = static_cast<float>(exponent_mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

inline void from_compute(float v, float& out) { out = v; }
inline void from_compute(double v, double& out) { out = v; }
inline void from_compute(float v, BFloat16& out) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<std::uint16_t>(
      nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_compute(float v, Half& out) {
#if defined(__F16C__)
  out.bits = static_cast<std::uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  std::uint32_t result;
  if (bits > 0x7f800000u) {
    result = 0x7e00u | ((bits >> 13) & 0x3ffu);
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or beyond
    result = 0x7c00u;
  } else if (bits >= 0x38800000u) {  // normal: round the mantissa to even
    result = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the mantissa so that the hardware rounds it
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    result = bits - 0x3f000000u;
  }
  out.bits = static_cast<std::uint16_t>(sign | result);
#endif
}

// ---- whole vectors -----------------------------------------------------------------------------

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

using U16 = VectorOf<std::uint16_t, kLanes<float>>::type;
using U32 = VectorOf<std::uint32_t, kLanes<float>>::type;

inline U16 load_bits(const void* p) {
  U16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> widen(U16 bits, BFloat16) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, U32) << 16);
}
inline Vec<float> widen(U16 bits, Half) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(Half{bits[i]});
  return v;
#endif
}

inline U16 narrow(Vec<float> v, BFloat16) {
  const U32 bits = reinterpret_cast<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16);
}
inline U16 narrow(Vec<float> v, Half) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(
      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<U16>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  U16 bits;
  for (int i = 0; i < kLanes<float>; ++i) {
    Half h;
    from_compute(v[i], h);
    bits[i] = h.bits;
  }
  return bits;
#endif
}

inline Vec<float> load(const BFloat16* p) { return widen(load_bits(p), BFloat16{}); }
inline Vec<float> load(const Half* p) { return widen(load_bits(p), Half{}); }

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
template <class T>
inline void store(T* p, Vec<float> v) {
  const U16 bits = narrow(v, T{});
  std::memcpy(p, &bits, sizeof bits);
}

// ---- the first n lanes (0 <= n <= kLanes): the others read as zero and are not written ----------

template <class T>
inline Vec<Compute<T>> load_n(const T* p, int n) {
  using A = Compute<T>;
  if (n == kLanes<A>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps((1u << n) - 1u, p));
  } else if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd((1u << n) - 1u, p));
  } else {
    return widen(reinterpret_cast<U16>(_mm256_maskz_loadu_epi16((1u << n) - 1u, p)), T{});
  }
#else
  T lanes[kLanes<A>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <class T>
inline void store_n(T* p, Vec<Compute<T>> v, int n) {
  using A = Compute<T>;
  if (n == kLanes<A>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1u, reinterpret_cast<__m512>(v));
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (1u << n) - 1u, reinterpret_cast<__m512d>(v));
  } else {
    _mm256_mask_storeu_epi16(p, (1u << n) - 1u, reinterpret_cast<__m256i>(narrow(v, T{})));
  }
#else
  T lanes[kLanes<A>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// ---- across lanes ------------------------------------------------------------------------------

template <class A>
using LaneIndex = typename VectorOf<std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>,
                                    kLanes<A>>::type;

// Sum of the lanes, always in the same tree order.
template <class A>
inline A sum(Vec<A> v) {
#pragma GCC unroll 4
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    LaneIndex<A> partner;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) partner[i] = i ^ width;
    v += __builtin_shuffle(v, partner);
  }
  return v[0];
}

// In-place transpose of a square of kLanes x kLanes elements held in kLanes vectors: log2(kLanes)
// rounds, each exchanging the off-diagonal blocks of one size.
template <class A>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int n = kLanes<A>;
#pragma GCC unroll 4
  for (int block = n / 2; block > 0; block /= 2) {
    LaneIndex<A> low, high;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const bool second = (i & block) != 0;
      low[i] = second ? n + i - block : i;
      high[i] = second ? n + i : i + block;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & block) continue;
      const Vec<A> upper = rows[i], lower = rows[i + block];
      rows[i] = __builtin_shuffle(upper, lower, low);
      rows[i + block] = __builtin_shuffle(upper, lower, high);
    }
  }
}

// out[i] = sum of the lanes of v[i]: one transpose sums a whole block of vectors.
template <class A>
inline void lane_sums(const Vec<A>* v, int count, A* out) {
  constexpr int n = kLanes<A>;
  for (int first = 0; first < count; first += n) {
    Vec<A> block[n];
    const int used = count - first < n ? count - first : n;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) block[i] = i < used ? v[first + i] : Vec<A>{};
    transpose<A>(block);
#pragma GCC unroll 4
    for (int width = n / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) block[i] += block[i + width];
    store_n(out + first, block[0], used);
  }
}

}  // namespace dla::DLA_ISA
