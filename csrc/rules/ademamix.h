// The AdEMAMix Optimizer: Better, Faster, Older, arXiv:2409.03137.
#pragma once

#include "checks.h"
#include "schedules.h"

namespace emopt {

struct AdEMAMix {
  static constexpr const char* kName = "ademamix";
  static constexpr const char* kStates[] = {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kSigned,
                                              StateCode::kUnsigned};

  int64_t num_beta_slow_warmup_steps;
  int64_t num_alpha_warmup_steps;
  double betas[3];  // fast, second moment, slow
  double eps;
  bool correct_bias;
  double alpha;

  static constexpr auto hyperparameters() {
    return std::make_tuple(
        hyperparameter("num_beta_slow_warmup_steps", &AdEMAMix::num_beta_slow_warmup_steps),
        hyperparameter("num_alpha_warmup_steps", &AdEMAMix::num_alpha_warmup_steps),
        hyperparameter("betas", &AdEMAMix::betas, Domain::kBeta), StepArgument{},
        hyperparameter("eps", &AdEMAMix::eps),
        hyperparameter("correct_bias", &AdEMAMix::correct_bias),
        hyperparameter("alpha", &AdEMAMix::alpha, Domain::kAny));
  }

  void check(ErrorText& error) const {
    check_half_life(error, "betas[0]", betas[0], num_beta_slow_warmup_steps);
    check_half_life(error, "betas[2]", betas[2], num_beta_slow_warmup_steps);
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> fast, slow, second;
    Real unbias_fast, alpha, eps;

    EMOPT_FN Step(const AdEMAMix& rule, double step)
        : fast(rule.betas[0]),
          slow(half_life_warmup(step, rule.betas[0], rule.betas[2],
                                rule.num_beta_slow_warmup_steps)),
          second(rule.betas[1]) {
      const double c_fast = bias_correction(rule.betas[0], step, rule.correct_bias);
      const double root = root_of_correction(rule.betas[1], step, rule.correct_bias);
      const double a = linear_warmup(step, rule.alpha, rule.num_alpha_warmup_steps);
      unbias_fast = static_cast<Real>(root / c_fast);
      alpha = static_cast<Real>(root * a);
      eps = static_cast<Real>(root * rule.eps);
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg_fast, Real& exp_avg_slow,
                             Real& exp_avg_sq) const {
      exp_avg_fast = fast(exp_avg_fast, grad);
      exp_avg_slow = slow(exp_avg_slow, grad);
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
      return (unbias_fast * exp_avg_fast + alpha * exp_avg_slow) / (square_root(exp_avg_sq) + eps);
    }
  };
};

}  // namespace emopt
