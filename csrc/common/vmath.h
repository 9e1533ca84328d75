// exp, sigmoid and tanh of whole vectors, accurate to about 2 units in the last place in float and
// in double, and the same in every lane. NaN stays NaN.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace dla::DLA_ISA {

template <class A>
struct ExpConstants;

// `shifter` + n holds the integer n in its low mantissa bits. ln 2 is split so that n * high is
// exact. `limit` keeps 2^n a normal number.
template <>
struct ExpConstants<float> {
  static constexpr float limit = 87.0f, shifter = 0x1.8p23f, high = 0.693359375f,
                         low = -2.12194440e-4f;
  static constexpr int bias = 127, mantissa = 23, terms = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double limit = 708.0, shifter = 0x1.8p52, high = 6.93145751953125e-1,
                          low = 1.42860682030941723212e-6;
  static constexpr int bias = 1023, mantissa = 52, terms = 13;
};

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
  x = x > K::limit ? splat<A>(K::limit) : x;
  x = x < -K::limit ? splat<A>(-K::limit) : x;
  const Vec<A> shifted = x * A(1.44269504088896340736) + K::shifter;
  const Vec<A> n = shifted - K::shifter;
  const Vec<A> r = (x - n * K::high) - n * K::low;
  // (e^r - 1 - r) / r^2 by Horner's rule on the Taylor series; |r| < 0.35.
  A reciprocal = 1;
  for (int k = 2; k <= K::terms; ++k) reciprocal /= A(k);
  Vec<A> p = splat<A>(reciprocal);
#pragma GCC unroll 16
  for (int k = K::terms; k > 2; --k) {
    reciprocal *= A(k);
    p = p * r + reciprocal;
  }
  const Bits power = (reinterpret_cast<Bits>(shifted) + K::bias) << K::mantissa;
  return {reinterpret_cast<Vec<A>>(power), r + r * r * p};
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
