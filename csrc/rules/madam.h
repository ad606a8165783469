// MAdam, magnitude-aware Adam, of NVIDIA's Emerging-Optimizers: without epsilon, and with squares
// that are scaled, so that those of small gradients do not underflow.
#pragma once

#include <cstdio>

#include "schedules.h"

namespace emopt {

struct MAdam {
  static constexpr const char* kName = "madam";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq_scaled"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kUnsigned};

  double betas[2];
  bool correct_bias;
  double scale_log2;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &MAdam::betas, Domain::kBeta),
                           hyperparameter("correct_bias", &MAdam::correct_bias), StepArgument{},
                           hyperparameter("scale_log2", &MAdam::scale_log2, Domain::kInteger));
  }

  // Even, so that the root of the scale is a power of two, too; and a normal float32 number.
  static constexpr double kLargestLog2 = 252;

  void check(ErrorText& error) const {
    if (::fmod(scale_log2, 2.0) == 0.0 && ::fabs(scale_log2) <= kLargestLog2) return;
    std::snprintf(error.text, error.capacity,
                  "scale_log2 is %.17g; expected an even whole number from -252 to 252",
                  scale_log2);
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> first, second;
    Real root_of_scale, unbias;

    EMOPT_FN Step(const MAdam& rule, double step) : first(rule.betas[0]), second(rule.betas[1]) {
      root_of_scale = static_cast<Real>(::ldexp(1.0, static_cast<int>(rule.scale_log2 / 2.0)));
      unbias = static_cast<Real>(root_of_correction(rule.betas[1], step, rule.correct_bias) /
                                 bias_correction(rule.betas[0], step, rule.correct_bias));
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq_scaled) const {
      exp_avg = first(exp_avg, grad);
      exp_avg_sq_scaled = second.of_square(exp_avg_sq_scaled, root_of_scale * grad);
      // Scaled first, which is exact: the quotient is then of ordinary size.
      const Real update = unbias * (root_of_scale * exp_avg) / square_root(exp_avg_sq_scaled);
      return exp_avg == 0 ? Real(0) : update;
    }
  };
};

}  // namespace emopt
