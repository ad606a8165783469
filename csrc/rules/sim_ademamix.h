// Simplified AdEMAMix: one momentum buffer and the gradient itself in place of AdEMAMix's two
// averages. arXiv:2409.03137, arXiv:2502.02431.
#pragma once

#include "checks.h"
#include "schedules.h"

namespace emopt {

struct SimplifiedAdEMAMix {
  static constexpr const char* kName = "sim_ademamix";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kUnsigned};

  int64_t num_beta_fast_warmup_steps;
  double min_beta_fast;
  double betas[2];  // fast, second moment
  double eps;
  bool correct_bias;
  double alpha;

  static constexpr auto hyperparameters() {
    return std::make_tuple(
        hyperparameter("num_beta_fast_warmup_steps",
                       &SimplifiedAdEMAMix::num_beta_fast_warmup_steps),
        hyperparameter("min_beta_fast", &SimplifiedAdEMAMix::min_beta_fast, Domain::kBeta),
        hyperparameter("betas", &SimplifiedAdEMAMix::betas, Domain::kBeta), StepArgument{},
        hyperparameter("eps", &SimplifiedAdEMAMix::eps),
        hyperparameter("correct_bias", &SimplifiedAdEMAMix::correct_bias),
        hyperparameter("alpha", &SimplifiedAdEMAMix::alpha, Domain::kAny));
  }

  void check(ErrorText& error) const {
    check_half_life(error, "min_beta_fast", min_beta_fast, num_beta_fast_warmup_steps);
    check_half_life(error, "betas[0]", betas[0], num_beta_fast_warmup_steps);
  }

  template <class Real>
  struct Step {
    Real beta;
    ExponentialMovingAverage<Real> second;
    Real unbias_first, alpha, eps;

    EMOPT_FN Step(const SimplifiedAdEMAMix& rule, double step) : second(rule.betas[1]) {
      const double b = half_life_warmup(step, rule.min_beta_fast, rule.betas[0],
                                        rule.num_beta_fast_warmup_steps);
      // c1 = (1 - B^t) / (1 - B), the momentum of a constant gradient of 1.
      const double c1 = rule.correct_bias ? one_minus_power(b, step) / (1.0 - b) : 1.0;
      const double root = root_of_correction(rule.betas[1], step, rule.correct_bias);
      beta = static_cast<Real>(b);
      unbias_first = static_cast<Real>(root / c1);
      alpha = static_cast<Real>(root * rule.alpha);
      eps = static_cast<Real>(root * rule.eps);
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      exp_avg = beta * exp_avg + grad;
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
      return (alpha * grad + unbias_first * exp_avg) / (square_root(exp_avg_sq) + eps);
    }
  };
};

}  // namespace emopt
