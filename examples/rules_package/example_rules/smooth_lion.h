// Lion, arXiv:2302.06675, with tanh instead of sign:
//   update  = tanh((beta1 * exp_avg + (1 - beta1) * grad) / temperature)
//   exp_avg = beta2 * exp_avg + (1 - beta2) * grad
#pragma once

#include <cmath>
#include <cstdio>

#include "rules/rule.h"

namespace emopt {

struct SmoothLion {
  static constexpr const char* kName = "smooth_lion";
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};

  double betas[2];
  double temperature;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &SmoothLion::betas, Domain::kBeta),
                           hyperparameter("temperature", &SmoothLion::temperature));
  }

  void check(ErrorText& error) const {
    if (temperature == 0.0) {
      snprintf(error.text, error.capacity, "temperature is 0; expected temperature > 0");
    }
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> direction, momentum;
    Real sharpness;

    EMOPT_FN Step(const SmoothLion& rule, double /*step*/)
        : direction(rule.betas[0]),
          momentum(rule.betas[1]),
          sharpness(static_cast<Real>(1.0 / rule.temperature)) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg) const {
      const Real update = std::tanh(sharpness * direction(exp_avg, grad));
      exp_avg = momentum(exp_avg, grad);
      return update;
    }
  };
};

}  // namespace emopt
