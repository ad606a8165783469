// Lion: Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.
#pragma once

#include "rule.h"

namespace emopt {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};

  double momentum_beta;
  double momentum_beta2;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("momentum_beta", &Lion::momentum_beta, Domain::kBeta),
                           hyperparameter("momentum_beta2", &Lion::momentum_beta2, Domain::kBeta));
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> direction, momentum;

    EMOPT_FN Step(const Lion& rule, double /*step*/)
        : direction(rule.momentum_beta), momentum(rule.momentum_beta2) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg) const {
      const Real update = sign(direction(exp_avg, grad));
      exp_avg = momentum(exp_avg, grad);
      return update;
    }
  };
};

}  // namespace emopt
