// What is computed from a few numbers of every plane, the same on CPUs and GPUs: statistics of
// o = a u + lam (d p + e), and sums of its gradient with u, p and e.
#pragma once

#include <utility>

#include "common/args.h"

namespace dla::DLA_ISA {

// Sums over a plane, in a table. All u, p, e are less a shift near their mean, which keeps the squares
// small: raw float sums of squares lose the variance when the mean is large.
enum PlaneSum : int {
  kX, kU, kUU, kP, kPP, kUP, kE, kEE, kPE, kUE, kFeatureSums,
  kShiftU = kFeatureSums, kShiftP, kShiftE, kPlaneFields
};

// Sums of the gradient of out (G) and of that arriving at o (D) and of their products with u, p, e,
// shifted as well: the table of the backward pass.
enum GradientSum : int {
  kG, kGU, kGP, kGE, kD, kDU, kDP, kDE, kGradientSums,
  kGradientShiftU = kGradientSums, kGradientShiftP, kGradientShiftE, kGradientFields
};

// Arrays [B, C] of the summary that a forward step leaves; those from kMeanU on under a norm by the
// statistics of the batch. Rests are what rounding took from the means: without them, u, p and e less
// their means would not add up to zero, nor would errors cancel where arriving gradients have a mean.
enum SummaryField : int {
  kMeanX, kMeanP, kAttention, kGate,
  kMeanU, kMeanE, kRestU, kRestP, kRestE, kCovarianceU, kCovarianceP, kCovarianceE
};
// The mean of u, p or e, which are maps 0, 1 and 2.
DLA_HOST_DEVICE constexpr SummaryField mean_of_map(int map) {
  return map == 0 ? kMeanU : map == 1 ? kMeanP : kMeanE;
}

// How much of u, p and e there is in o, for a plane. A Number is a double, or a vector of them for
// several channels.
template <class Number>
struct MixtureOfO {
  Number a, lam_d, lam;

  DLA_HOST_DEVICE MixtureOfO(Number a, Number d, Number lam) : a(a), lam_d(lam * d), lam(lam) {}

  // The same of o as three numbers are of u, p and e.
  DLA_HOST_DEVICE Number operator()(Number u, Number p, Number e) const {
    return a * u + lam_d * p + lam * e;
  }
};

// A plane of o, or planes of neighbouring channels of one sample, in the forward pass. at(field), of
// the table, is a Number.
template <class At>
struct PlaneOfO {
  using Number = decltype(std::declval<At>()(0));
  At at;
  double pixels;
  MixtureOfO<Number> mixture;

  // Calls body(offset from u, mean, covariance with o) for u, p and e: over the plane. Returns the
  // variance of o (but for rounding, at least 0).
  template <class Body>
  DLA_HOST_DEVICE Number for_maps(const Body& body) const {
    const Number of_o = mix(kU, kP, kE);
    const auto map = [&](int f, int sum, int with_u, int with_p, int with_e) {
      const Number mean = at(sum) / pixels;
      const Number covariance = (mix(with_u, with_p, with_e) - of_o * mean) / pixels;
      body(f, at(kShiftU + f) + mean, covariance);
      return covariance;
    };
    return mixture(map(0, kU, kUU, kUP, kUE), map(1, kP, kUP, kPP, kPE),
                   map(2, kE, kUE, kPE, kEE));
  }
  DLA_HOST_DEVICE Number mix(int of_u, int of_p, int of_e) const {
    return mixture(at(of_u), at(of_p), at(of_e));
  }
  DLA_HOST_DEVICE Number mean() const {
    return mix(kShiftU, kShiftP, kShiftE) + mix(kU, kP, kE) / pixels;
  }
};
template <class At, class Number>
PlaneOfO(At, double, MixtureOfO<Number>) -> PlaneOfO<At>;

// g = dL/do = out_scale grad_out + slope (o - mean) + level + grad_o, for the planes of a channel;
// out_scale is `weight` (gamma rstd) times the sample's drop scale. slope and level are 0 unless the
// norm is by the statistics of the batch.
template <class Number>
struct GradientOfO {
  Number weight, mean, slope{}, level{};

  // The gradient passes a norm by the statistics of `count` values of o, whose weight and bias have
  // the gradients dweight and dbias.
  DLA_HOST_DEVICE void pass_norm(Number rstd, Number dweight, Number dbias, double count) {
    slope = -weight * rstd * dweight / count;
    level = -weight * dbias / count;
  }
};

// Such planes in the backward pass. at(field) is of its table; kept(field) of the summary, which is asked
// for only where the shifts are the means in it.
template <class At, class Kept>
struct PlaneOfGradient {
  using Number = decltype(std::declval<At>()(0));
  At at;
  Kept kept;
  double pixels;
  MixtureOfO<Number> mixture;

  DLA_HOST_DEVICE Number shift() const {
    return mixture(at(kGradientShiftU), at(kGradientShiftP), at(kGradientShiftE));
  }
  // Mean of o over the plane.
  DLA_HOST_DEVICE Number mean() const {
    return shift() + mixture(kept(kRestU), kept(kRestP), kept(kRestE));
  }
  // Sum of (o - centre) grad_out.
  DLA_HOST_DEVICE Number with_out(Number centre) const {
    return mixture(at(kGU), at(kGP), at(kGE)) + (shift() - centre) * at(kG);
  }

  struct Products {
    Number u, p, e;
  };
  // Sums of g f for f = u, p, e, from the products of f with grad_out, o, 1 and grad_o.
  template <bool kThroughNorm>
  DLA_HOST_DEVICE Products with_g(const GradientOfO<Number>& g, Number out_scale) const {
    Number through_norm{}, alone = out_scale * at(kG) + at(kD);
    if constexpr (kThroughNorm) through_norm = (g.slope * (mean() - g.mean) + g.level) * pixels;
    alone += through_norm;
    const auto product = [&](int f) {
      Number sum = out_scale * at(kGU + f) + at(kDU + f) + at(kGradientShiftU + f) * alone;
      if constexpr (kThroughNorm)
        sum += g.slope * pixels * kept(kCovarianceU + f) + through_norm * kept(kRestU + f);
      return sum;
    };
    return {product(0), product(1), product(2)};
  }
};
template <class At, class Kept, class Number>
PlaneOfGradient(At, Kept, double, MixtureOfO<Number>) -> PlaneOfGradient<At, Kept>;

}  // namespace dla::DLA_ISA
