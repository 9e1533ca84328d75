// Vectors of the compute type (float or double) at the width of the instruction set this file is
// compiled for, with loads and stores that convert from and to the feature types.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dtype.h"

namespace dla::DLA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E)), may_alias));
};
template <class A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

// How many rows of a map a kernel takes at a time at most (1, 4 or 8), and whether several versions of
// it are worth the time to compile them. Not for double, nor for an x86 processor without AVX2; and
// with a sanitizer large versions take minutes.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kMostFloatRows = 4;
#elif defined(DLA_X86_ISAS)
constexpr int kMostFloatRows = kVectorBytes > 16 ? 8 : 1;
#else
constexpr int kMostFloatRows = 8;
#endif
template <class A>
constexpr int kMostRows = std::is_same_v<A, float> ? kMostFloatRows : 1;
template <class A>
constexpr bool kTuned = kMostRows<A> >= 4;

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

// ---- past the caches ---------------------------------------------------------------------------

// Streamed stores, of whole vectors to addresses aligned to their size: where the instruction set has
// them, memory is not read before it is written, and what is in the caches stays there. Other threads
// may read it after end_streams().
#if defined(__AVX2__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
constexpr std::uintptr_t kLineBytes = 64;  // to be written as a whole

template <class V>
inline void stream_vector(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64)
    return _mm512_stream_ps(static_cast<float*>(p), reinterpret_cast<__m512>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32)
    return _mm256_stream_ps(static_cast<float*>(p), reinterpret_cast<__m256>(v));
#endif
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline void stream(T* p, Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == 2)
    stream_vector(p, narrow(v, T{}));
  else
    stream_vector(p, v);
}
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether whole vectors at p, p + stride, .. can be.
template <class T>
inline bool are_aligned(const T* p, std::int64_t stride) {
  constexpr int lanes = kLanes<Compute<T>>;
  return reinterpret_cast<std::uintptr_t>(p) % (lanes * sizeof(T)) == 0 && stride % lanes == 0;
}
// Whether each of them is a cache line. Lines that are left unfinished for others reach memory in pieces.
template <class T>
inline bool are_lines(const T* p, std::int64_t stride) {
  return kLanes<Compute<T>> * sizeof(T) == kLineBytes && are_aligned(p, stride);
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

// store_n(), or stream() of a whole vector.
template <class T>
inline void put_n(T* p, Vec<Compute<T>> v, int n, bool streamed) {
  if (streamed && n == kLanes<Compute<T>>)
    stream(p, v);
  else
    store_n(p, v, n);
}

// What a pass that does next to nothing but read and write makes, in runs of vectors that begin at every
// multiple of `run`. It is streamed if caches would not keep it with what it is made of.
template <class T>
class Results {
 public:
  Results(T* data, std::int64_t count, std::int64_t run)
      : data_(data),
        streamed_(count * static_cast<std::int64_t>(sizeof(T)) > kMostCachedBytes &&
                  are_aligned(data, run)) {}
  void put(std::int64_t i, Vec<Compute<T>> v, int n) const { put_n(data_ + i, v, n, streamed_); }

 private:
  static constexpr std::int64_t kMostCachedBytes = 16 << 20;
  T* data_;
  bool streamed_;
};

// Calls body(offset, lanes) for `count` elements, a vector at a time. Passing the full length as a
// constant lets loads and stores of whole vectors compile to one instruction.
template <class A, class Body>
inline void for_vectors(std::int64_t count, Body&& body) {
  constexpr std::int64_t lanes = kLanes<A>;
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(i, kLanes<A>);
  if (i < count) body(i, static_cast<int>(count - i));
}

// ---- masks: which lanes of a vector are meant ---------------------------------------------------

template <class A>
using LaneIndex = typename VectorOf<std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>,
                                    kLanes<A>>::type;

// A bit per lane with AVX-512, else all bits of a lane.
#if defined(__AVX512F__)
template <class A>
using Mask = std::uint32_t;
#else
template <class A>
using Mask = LaneIndex<A>;
#endif

// The lanes for which `holds(lane)`.
template <class A, class Predicate>
inline Mask<A> mask_where(const Predicate& holds) {
  Mask<A> mask{};
  for (int lane = 0; lane < kLanes<A>; ++lane) {
#if defined(__AVX512F__)
    mask |= static_cast<std::uint32_t>(holds(lane)) << lane;
#else
    mask[lane] = holds(lane) ? -1 : 0;
#endif
  }
  return mask;
}

// v in the lanes of the mask, zero in the others.
template <class A>
inline Vec<A> keep(Mask<A> mask, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v)));
  else
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_mov_pd(static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v)));
#else
  return reinterpret_cast<Vec<A>>(reinterpret_cast<LaneIndex<A>>(v) & mask);
#endif
}

// a - b in the lanes of the mask, zero in the others.
template <class A>
inline Vec<A> subtract_masked(Vec<A> a, Vec<A> b, Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_sub_ps(static_cast<__mmask16>(mask), reinterpret_cast<__m512>(a),
                            reinterpret_cast<__m512>(b)));
  else
    return reinterpret_cast<Vec<A>>(
        _mm512_maskz_sub_pd(static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(a),
                            reinterpret_cast<__m512d>(b)));
#else
  return keep<A>(mask, a - b);
#endif
}

#if !defined(__AVX512F__)
template <class A>
inline bool is_full(Mask<A> mask) {
#if defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) == -1;
#else
  auto all = mask[0];
  for (int lane = 1; lane < kLanes<A>; ++lane) all &= mask[lane];
  return all != 0;
#endif
}
#endif

// Lanes outside the mask read as zero; their memory is not touched and need not exist.
template <class A>
inline Vec<A> load_masked(const A* p, Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  else
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(_mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask)));
  else
    return reinterpret_cast<Vec<A>>(_mm256_maskload_pd(p, reinterpret_cast<__m256i>(mask)));
#else
  if (is_full<A>(mask)) return load(p);
  Vec<A> v{};
  for (int lane = 0; lane < kLanes<A>; ++lane)
    if (mask[lane]) v[lane] = p[lane];
  return v;
#endif
}

// c + a b in the lanes of the mask, c in the others: as fast as without a mask where the instruction
// set has it, and then cheaper than masking the loads.
#if defined(__AVX512F__)
constexpr bool kHasMaskedArithmetic = true;
#else
constexpr bool kHasMaskedArithmetic = false;
#endif
template <class A>
inline Vec<A> multiply_add_masked(Vec<A> a, Vec<A> b, Vec<A> c, Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return reinterpret_cast<Vec<A>>(
        _mm512_mask3_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                              reinterpret_cast<__m512>(c), static_cast<__mmask16>(mask)));
  else
    return reinterpret_cast<Vec<A>>(
        _mm512_mask3_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b),
                              reinterpret_cast<__m512d>(c), static_cast<__mmask8>(mask)));
#else
  return c + a * keep<A>(mask, b);
#endif
}

template <class A>
inline void store_masked(A* p, Vec<A> v, Mask<A> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
#else
  // Masked stores of AVX2 are several times slower than these.
  if (is_full<A>(mask)) return store(p, v);
  for (int lane = 0; lane < kLanes<A>; ++lane)
    if (mask[lane]) p[lane] = v[lane];
#endif
}

// ---- across lanes ------------------------------------------------------------------------------

template <class A>
using AllLanes = std::make_integer_sequence<int, kLanes<A>>;

// Lane i of the result is lane index[i] of a and b laid side by side.
template <int... index, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 4, std::int32_t, std::int64_t>;
  using Index = typename VectorOf<Lane, sizeof...(index)>::type;
  return __builtin_shuffle(a, b, Index{index...});
#endif
}

// v with every lane plus the one `width` lanes apart.
template <int width, class A, int... lane>
inline Vec<A> add_partner(Vec<A> v, std::integer_sequence<int, lane...>) {
  return v + shuffle<(lane ^ width)...>(v, v);
}

// Sum of the lanes, always in the same tree order.
template <class A, int width = kLanes<A> / 2>
inline A sum(Vec<A> v) {
  if constexpr (width == 0) {
    return v[0];
  } else {
    return sum<A, width / 2>(add_partner<width, A>(v, AllLanes<A>{}));
  }
}

// Rows i and i + block exchange their off-diagonal blocks, for every i without that bit.
template <int block, class A, int... lane>
inline void exchange_blocks(Vec<A>* rows, std::integer_sequence<int, lane...>) {
  constexpr int n = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & block) continue;
    const Vec<A> upper = rows[i], lower = rows[i + block];
    rows[i] = shuffle<(lane & block ? n + lane - block : lane)...>(upper, lower);
    rows[i + block] = shuffle<(lane & block ? n + lane : lane + block)...>(upper, lower);
  }
}

// In-place transpose of a square of kLanes x kLanes elements held in kLanes vectors: log2(kLanes)
// rounds, each exchanging the off-diagonal blocks of one size.
template <class A, int block = kLanes<A> / 2>
inline void transpose(Vec<A>* rows) {
  if constexpr (block > 0) {
    exchange_blocks<block, A>(rows, AllLanes<A>{});
    transpose<A, block / 2>(rows);
  }
}

// Sums of pairs of lanes `width` apart: of b where the lane's number has the bit `width`, else of a.
template <int width, class A, int... lane>
inline Vec<A> pair_sums(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
  constexpr int n = kLanes<A>;
  return shuffle<(lane & width ? n + lane : lane)...>(a, b) +
         shuffle<(lane & width ? n + (lane ^ width) : (lane ^ width))...>(a, b);
}

// Lane i of v[0] = sum of the lanes of v[i]: every round halves the number of vectors.
template <class A, int width = kLanes<A> / 2>
inline void fold_lanes(Vec<A>* v) {
  if constexpr (width > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i)
      v[i] = pair_sums<width, A>(v[i], v[i + width], AllLanes<A>{});
    fold_lanes<A, width / 2>(v);
  }
}

// out[i] = sum of the lanes of v[i]. Writes whole vectors: numbers read back one by one would wait long
// for a masked store.
template <class A>
inline void lane_sums(const Vec<A>* v, int count, A* out) {
  constexpr int n = kLanes<A>;
  for (int first = 0; first < count; first += n) {
    Vec<A> block[n];
    const int used = count - first < n ? count - first : n;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) block[i] = i < used ? v[first + i] : Vec<A>{};
    fold_lanes<A>(block);
    store(out + first, block[0]);
  }
}

}  // namespace dla::DLA_ISA
