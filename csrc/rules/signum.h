// Signum: signSGD, Compressed Optimisation for Non-Convex Problems, arXiv:1802.04434; scaling by a
// matrix's shape: arXiv:2506.07254.
#pragma once

#include "schedules.h"

namespace emopt {

struct Signum {
  static constexpr const char* kName = "signum";
  static constexpr const char* kStates[] = {"exp_avg"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned};

  double momentum_beta;
  bool correct_bias;
  bool use_nesterov;
  bool use_shape_scaling;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("momentum_beta", &Signum::momentum_beta, Domain::kBeta),
                           hyperparameter("correct_bias", &Signum::correct_bias),
                           hyperparameter("use_nesterov", &Signum::use_nesterov), StepArgument{},
                           hyperparameter("use_shape_scaling", &Signum::use_shape_scaling));
  }

  static double shape_scale(int64_t rows, int64_t cols) {
    return 2.0 / (static_cast<double>(rows) + static_cast<double>(cols));
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> momentum;
    Real look_ahead, look_now;
    bool use_nesterov;

    EMOPT_FN Step(const Signum& rule, double step)
        : momentum(rule.momentum_beta), use_nesterov(rule.use_nesterov) {
      const double c1 = bias_correction(rule.momentum_beta, step, rule.correct_bias);
      const double c1_next = bias_correction(rule.momentum_beta, step + 1.0, rule.correct_bias);
      look_ahead = static_cast<Real>(rule.momentum_beta / c1_next);
      look_now = static_cast<Real>((1.0 - rule.momentum_beta) / c1);
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg) const {
      exp_avg = momentum(exp_avg, grad);
      return sign(use_nesterov ? look_ahead * exp_avg + look_now * grad : exp_avg);
    }
  };
};

}  // namespace emopt
