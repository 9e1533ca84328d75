// exp, sigmoid and tanh of whole vectors, accurate to about 2 units in the last place in float and
// in double, and the same in every lane. NaN stays NaN.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace dla::DLA_ISA {

template <class A>
struct ExpConstants;

// `shifter` + n holds n + bias in its low mantissa bits, so that a shift makes 2^n of it. ln 2 is
// split so that n * high is exact. `limit` keeps 2^n a normal number. `series` is the Taylor series
// of (e^r - 1 - r) / r^2, good to the last bit for |r| < 0.35.
template <>
struct ExpConstants<float> {
  static constexpr float limit = 87.0f, shifter = 0x1.8p23f + 127, high = 0.693359375f,
                         low = -2.12194440e-4f;
  static constexpr int mantissa = 23, terms = 6;
};
template <>
struct ExpConstants<double> {
  static constexpr double limit = 708.0, shifter = 0x1.8p52 + 1023, high = 6.93145751953125e-1,
                          low = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, terms = 12;
};

template <class A, int terms = ExpConstants<A>::terms>
constexpr std::array<A, terms> exp_series() {
  std::array<A, terms> series{};
  double factorial = 1;
  for (int k = 0; k < terms; ++k) {
    factorial *= k + 2;
    series[k] = static_cast<A>(1 / factorial);
  }
  return series;
}

// Value of a polynomial by halves: a shorter chain of dependent operations than Horner's.
template <int first, int count, class A, std::size_t n>
inline Vec<A> polynomial(const std::array<A, n>& c, const Vec<A>* powers) {
  if constexpr (count == 1) {
    return splat<A>(c[first]);
  } else {
    constexpr int log = std::bit_width(static_cast<unsigned>(count - 1)) - 1;
    constexpr int half = 1 << log;
    const Vec<A> low = polynomial<first, half>(c, powers);
    return polynomial<first + half, count - half>(c, powers) * powers[log] + low;
  }
}

// x within +-limit. NaN stays: the comparisons are false.
template <class A>
inline Vec<A> clamp(Vec<A> x, A limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512 low = _mm512_max_ps(_mm512_set1_ps(-limit), reinterpret_cast<__m512>(x));
    return reinterpret_cast<Vec<A>>(_mm512_min_ps(_mm512_set1_ps(limit), low));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    const __m256 low = _mm256_max_ps(_mm256_set1_ps(-limit), reinterpret_cast<__m256>(x));
    return reinterpret_cast<Vec<A>>(_mm256_min_ps(_mm256_set1_ps(limit), low));
  }
#endif
  x = x > limit ? splat<A>(limit) : x;
  return x < -limit ? splat<A>(-limit) : x;
}

// exp(x) = scale (1 + fraction), |fraction| < 0.42, for x clamped to +-ExpConstants::limit.
template <class A>
struct ExpParts {
  Vec<A> scale, fraction;
};

template <class A>
inline ExpParts<A> exp_parts(Vec<A> x) {
  using K = ExpConstants<A>;
  using Bits = typename VectorOf<std::conditional_t<sizeof(A) == 4, std::uint32_t, std::uint64_t>,
                                 kLanes<A>>::type;
  static constexpr auto series = exp_series<A>();
  x = clamp<A>(x, K::limit);
  const Vec<A> shifted = x * A(1.44269504088896340736) + K::shifter;
  const Vec<A> n = shifted - K::shifter;
  const Vec<A> r = (x - n * K::high) - n * K::low;
  Vec<A> powers[4] = {r};
  for (int i = 1; (1 << i) < K::terms; ++i) powers[i] = powers[i - 1] * powers[i - 1];
  const Vec<A> p = polynomial<0, K::terms>(series, powers);
  return {reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(shifted) << K::mantissa),
          r + powers[1] * p};
}

template <class A>
inline Vec<A> exp(Vec<A> x) {
  const ExpParts<A> e = exp_parts<A>(x);
  return e.scale + e.scale * e.fraction;
}

template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp<A>(-x));
}

template <class A>
inline Vec<A> tanh(Vec<A> x) {
  // With m = e^(-2|x|) - 1, which loses nothing near zero: tanh |x| = -m / (2 + m).
  const Vec<A> magnitude = x < A(0) ? -x : x;
  const ExpParts<A> e = exp_parts<A>(A(-2) * magnitude);
  const Vec<A> m = e.scale * e.fraction + (e.scale - A(1));
  const Vec<A> t = m / (A(2) + m);
  return x < A(0) ? t : -t;
}

}  // namespace dla::DLA_ISA
