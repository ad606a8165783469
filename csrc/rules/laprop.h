// LaProp: Separating Momentum and Adaptivity in Adam, arXiv:2002.04839.
#pragma once

#include "schedules.h"

namespace emopt {

struct LaProp {
  static constexpr const char* kName = "laprop";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kUnsigned};

  bool correct_bias;
  double betas[2];
  double eps;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("correct_bias", &LaProp::correct_bias),
                           hyperparameter("betas", &LaProp::betas, Domain::kBeta), StepArgument{},
                           hyperparameter("eps", &LaProp::eps));
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> first, second;
    Real unbias_first, rescale, eps;

    EMOPT_FN Step(const LaProp& rule, double step) : first(rule.betas[0]), second(rule.betas[1]) {
      const double c1 = bias_correction(rule.betas[0], step, rule.correct_bias);
      const double root = root_of_correction(rule.betas[1], step, rule.correct_bias);
      unbias_first = static_cast<Real>(1.0 / c1);
      rescale = static_cast<Real>(root);
      eps = static_cast<Real>(root * rule.eps);
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
      // Unlike Adam, LaProp normalizes the gradient before it averages it.
      const Real normalised = rescale * grad / (square_root(exp_avg_sq) + eps);
      exp_avg = first(exp_avg, normalised);
      return unbias_first * exp_avg;
    }
  };
};

}  // namespace emopt
