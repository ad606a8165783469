// Functions that rules traced from Python use beyond those of rule.h.
//
// On elements, they give the same bits on every instruction set and on CUDA, and vectorize: each is
// one instruction, or a few selects.
#pragma once

#include <math.h>

#include "rule.h"

namespace emopt {

// ---- on elements --------------------------------------------------------------------------------

// maximum() and minimum() with a bound that is a number of the step, in one instruction. NaN if x
// is NaN; a bound that is NaN does not bind. Of zeros of both signs, x.
template <class Real>
EMOPT_FN Real at_least(Real x, Real bound) {
  return bound > x ? bound : x;
}
template <class Real>
EMOPT_FN Real at_most(Real x, Real bound) {
  return bound < x ? bound : x;
}

EMOPT_FN float absolute(float x) { return ::fabsf(x); }
EMOPT_FN double absolute(double x) { return ::fabs(x); }

// The magnitude of x with the sign of y, also of a zero. A NaN counts as positive: compilers do not
// keep its sign.
EMOPT_FN float copy_sign(float x, float y) { return ::copysignf(x, y == y ? y : 1.0f); }
EMOPT_FN double copy_sign(double x, double y) { return ::copysign(x, y == y ? y : 1.0); }

// Rounded twice, unlike torch.rsqrt on some devices.
template <class Real>
EMOPT_FN Real reciprocal_root(Real x) {
  return Real(1) / square_root(x);
}

// 1 or 0.
template <class Real>
EMOPT_FN Real as_number(bool is_true) {
  return is_true ? Real(1) : Real(0);
}

// ---- once per step ------------------------------------------------------------------------------

// a % b and a // b of Python's floats: the remainder has the sign of b. fmod() is exact, so host
// and device agree. Where Python raises an error, for b = 0, both are NaN.
EMOPT_FN double floor_modulo(double a, double b) {
  const double remainder = ::fmod(a, b);
  if (remainder == 0.0) return ::copysign(0.0, b);
  return (b < 0.0) != (remainder < 0.0) ? remainder + b : remainder;
}
EMOPT_FN double floor_divide(double a, double b) {
  const double remainder = ::fmod(a, b);
  double quotient = (a - remainder) / b;  // whole, but for rounding
  if (remainder != 0.0 && (b < 0.0) != (remainder < 0.0)) quotient -= 1.0;
  if (quotient == 0.0) return ::copysign(0.0, a / b);
  const double below = ::floor(quotient);
  return quotient - below > 0.5 ? below + 1.0 : below;
}

}  // namespace emopt
