// What is computed from a few numbers of every plane, the same on CPUs and GPUs: statistics of
// o = a u + lam (d p + e), and sums of its gradient with u, p and e.
#pragma once

#include <utility>

#include "common/args.h"

namespace dla::DLA_ISA {

// Sums over a plane. u, p, e are shifted by about their mean, or by their value at one pixel as long
// as the means are not known (kShift*). That keeps the squares small: raw float sums of squares lose
// the variance when the mean is large.
enum PlaneSum : int {
  kX, kU, kUU, kP, kPP, kUP, kE, kEE, kPE, kUE,  // of the features
  kG, kGU, kGP, kGE,                             // with the gradient of out
  kD, kDU, kDP, kDE,                             // with the gradient arriving at o
  kSums,
  kShiftU = kSums, kShiftP, kShiftE,
  kPlaneFields
};

// g = dL/do = out_scale grad_out + slope (o - mean) + level + grad_o, for the planes of a channel;
// out_scale is `weight` (gamma rstd) times the sample's drop scale. A Number is a double, or a
// vector of them for several channels.
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

// A plane of o, or planes of neighbouring channels of one sample. at(field) is a Number.
template <class At>
struct PlaneOfO {
  using Number = decltype(std::declval<At>()(0));
  At at;
  double pixels;
  Number a, lam_d, lam;

  DLA_HOST_DEVICE PlaneOfO(At at, double pixels, Number a, Number d, Number lam)
      : at(at), pixels(pixels), a(a), lam_d(lam * d), lam(lam) {}

  // The same of o as three fields are of u, p and e.
  DLA_HOST_DEVICE Number mix(int of_u, int of_p, int of_e) const {
    return a * at(of_u) + lam_d * at(of_p) + lam * at(of_e);
  }
  DLA_HOST_DEVICE Number shift() const { return mix(kShiftU, kShiftP, kShiftE); }
  DLA_HOST_DEVICE Number mean() const { return shift() + mix(kU, kP, kE) / pixels; }
  // Sum of squares about the mean of the plane (but for rounding, at least 0).
  DLA_HOST_DEVICE Number centred_square() const {
    const Number sum = mix(kU, kP, kE);
    const Number square =
        a * mix(kUU, kUP, kUE) + lam_d * mix(kUP, kPP, kPE) + lam * mix(kUE, kPE, kEE);
    return square - sum * sum / pixels;
  }
  // Sum of (o - centre) grad_out.
  DLA_HOST_DEVICE Number with_out(Number centre) const {
    return mix(kGU, kGP, kGE) + (shift() - centre) * at(kG);
  }

  struct Products {
    Number u, p, e;
  };
  // Sums of g f for f = u, p, e, from the products of f with grad_out, o, 1 and grad_o.
  DLA_HOST_DEVICE Products with_g(const GradientOfO<Number>& g, Number out_scale) const {
    const Number centre = shift() - g.mean;
    const Number alone = out_scale * at(kG) + g.slope * (mix(kU, kP, kE) + centre * pixels) +
                         g.level * pixels + at(kD);
    const auto product = [&](int f, int shift, Number with_o, int with_out, int with_grad_o) {
      return out_scale * at(with_out) + g.slope * (with_o + centre * at(f)) + g.level * at(f) +
             at(with_grad_o) + at(shift) * alone;
    };
    return {product(kU, kShiftU, mix(kUU, kUP, kUE), kGU, kDU),
            product(kP, kShiftP, mix(kUP, kPP, kPE), kGP, kDP),
            product(kE, kShiftE, mix(kUE, kPE, kEE), kGE, kDE)};
  }
};

}  // namespace dla::DLA_ISA
