// The interface of a rule, and the functions that rules share.
//
// A rule is a struct with the name of its optimizer class. It only computes values: it knows
// nothing of torch, memory, threads or devices. It provides
//
//   static constexpr const char* kName             the stem of its operator: "<kName>_update_"
//   static constexpr const char* kStates[]         its states, in the order that users pass them
//   <hyperparameters>                              public members: double, double[N], bool, int64_t
//   static constexpr auto hyperparameters()        their argument names and domains, in the order
//                                                  that users pass them; `StepArgument` is `step`
//   static constexpr int kLowestStep               (optional) 1 if steps count from 1, as they do
//                                                  if its member `correct_bias` is true; else 0
//   void check(ErrorText&) const                   (optional) rejects combinations of values; like
//                                                  all of the rule's code, it throws no exception
//   static double shape_scale(rows, cols)          (optional) a factor for a 2-D tensor's update,
//                                                  used if its member `use_shape_scaling` is true
//   static constexpr ScalarState kScalarStates[]   (optional) numbers that optimizers carry from
//                                                  step to step, beside each parameter's states
//   double scalars[N]                              needed then: their values before the step
//   void advance(double step)                      needed then: replaces those by the values after
//                                                  the step; `Step` may call it, on a copy
//   static constexpr StateCode kStateCodes[]       (optional) which states optimizers may store as
//                                                  8-bit codes: an entry for each of kStates
//
// and
//
//   template <class Real> struct Step {
//     Step(const Rule&, double step)               once per step, in double: reduces schedules and
//                                                  bias corrections to constants of type Real
//     Real operator()(Real grad, Real& state...) const -> update         once per element
//     bool keeps_weight                            (optional) true if this step has no update:
//                                                  operator() returns 0; parameter and master keep
//                                                  every bit, and nothing decays
//   };
//
// A rule without states omits kStates. `Step` holds only numbers and flags: it is copied as bytes.
//
// A branch on a flag of `Step` in `operator()` is free: the flag is the same for all elements, so
// the compiler moves the branch out of the loop (GCC 12: one vector loop for each case). It does
// not do that to a large body. For such a body, a rule may name its cases, and `Step` compute one
// of them, as operator() does; the CPU's engine then chooses the case outside of its loop:
//
//   static constexpr int kNumCases
//
//   int Step::which                                the step's case, below kNumCases
//   template <int kCase> Real Step::compute(Real grad, Real& state...) const
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

// Rule code must be inlined: it is then compiled for the instruction set of the loop around it, and
// there is no out-of-line copy that the linker could share between instruction sets.
#if defined(__CUDACC__)
#define EMOPT_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define EMOPT_FN __forceinline
#else
#define EMOPT_FN inline __attribute__((always_inline))
#endif

namespace emopt {

// ---- arithmetic ---------------------------------------------------------------------------------

// average <- beta * average + (1 - beta) * value. `1 - beta` is computed in double: in float it
// would lose the digits that matter when beta is close to 1.
template <class Real>
struct ExponentialMovingAverage {
  Real beta;
  Real one_minus_beta;

  EMOPT_FN explicit ExponentialMovingAverage(double beta_)
      : beta(static_cast<Real>(beta_)), one_minus_beta(static_cast<Real>(1.0 - beta_)) {}

  EMOPT_FN Real operator()(Real average, Real value) const {
    return beta * average + one_minus_beta * value;
  }

  // Averages the value's square. Multiplied in this order, since the square may overflow though its
  // term in the average does not.
  EMOPT_FN Real of_square(Real average, Real value) const {
    return beta * average + one_minus_beta * value * value;
  }
};

// Like torch.sign: 0 for both zeros and for NaN.
template <class Real>
EMOPT_FN Real sign(Real x) {
  return static_cast<Real>(x > 0) - static_cast<Real>(x < 0);
}

// NaN if either is NaN, like torch.maximum and torch.minimum; the first one's bits if both are. Of
// zeros of both signs, either way, the second: torch leaves open which.
template <class Real>
EMOPT_FN Real maximum(Real a, Real b) {
  const Real larger = a > b ? a : b;  // b if either is NaN
  return a != a ? a : larger;
}
template <class Real>
EMOPT_FN Real minimum(Real a, Real b) {
  const Real smaller = a < b ? a : b;
  return a != a ? a : smaller;
}

EMOPT_FN float square_root(float x) { return ::sqrtf(x); }
EMOPT_FN double square_root(double x) { return ::sqrt(x); }

// ---- hyperparameters ----------------------------------------------------------------------------

enum class Domain : uint8_t {
  kAny,          // any number but NaN
  kBeta,         // [0, 1)
  kNonNegative,  // [0, inf]
  kInteger,      // a whole number; neither NaN nor infinite
};

template <class Rule, class Value>
struct Hyperparameter {
  const char* name;
  Value Rule::* member;
  Domain domain;
};

// A flag is a bool. A whole number, such as that of warm-up steps, is an int64_t; None is passed as
// 0. It may be negative with Domain::kInteger.
template <class Rule, class Value>
constexpr Hyperparameter<Rule, Value> hyperparameter(const char* name, Value Rule::* member,
                                                     Domain domain = Domain::kNonNegative) {
  return {name, member, domain};
}

// A double that may be None, which is passed as NaN.
template <class Rule>
struct OptionalHyperparameter {
  const char* name;
  double Rule::* member;
  Domain domain;
};

template <class Rule>
constexpr OptionalHyperparameter<Rule> optional_hyperparameter(
    const char* name, double Rule::* member, Domain domain = Domain::kNonNegative) {
  return {name, member, domain};
}

// A scalar state: its name, and its value in a new optimizer. It is stored in float32.
struct ScalarState {
  const char* name;
  double first;
};

// How a state may be stored as 8-bit codes (engine/codes.h).
enum class StateCode : uint8_t {
  kNone,      // not at all
  kSigned,    // it may have any sign
  kUnsigned,  // it is never negative
};

// The position of `step` among the arguments. A rule without it does not depend on the step.
struct StepArgument {};

// An error message, in the caller's memory; empty if there is no error.
struct ErrorText {
  char* text;
  size_t capacity;

  bool is_empty() const { return *text == '\0'; }
};

}  // namespace emopt
