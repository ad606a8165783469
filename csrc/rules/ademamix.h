// The AdEMAMix Optimizer: Better, Faster, Older, arXiv:2409.03137.
#pragma once

#include "schedules.h"

namespace emopt {

struct AdEMAMix {
  static constexpr const char* kName = "ademamix";
  static constexpr const char* kStates[] = {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"};

  int64_t num_beta_slow_warmup_steps;
  int64_t num_alpha_warmup_steps;
  double betas[3];  // fast, second moment, slow
  double eps;
  bool correct_bias;
  double alpha;

  static constexpr auto options() {
    return std::make_tuple(
        option("num_beta_slow_warmup_steps", &AdEMAMix::num_beta_slow_warmup_steps),
        option("num_alpha_warmup_steps", &AdEMAMix::num_alpha_warmup_steps),
        option("betas", &AdEMAMix::betas, Domain::kBeta), StepArgument{},
        option("eps", &AdEMAMix::eps), option("correct_bias", &AdEMAMix::correct_bias),
        option("alpha", &AdEMAMix::alpha, Domain::kAny));
  }

  std::string problem() const {
    const std::string start = half_life_problem("betas[0]", betas[0], num_beta_slow_warmup_steps);
    return start.empty() ? half_life_problem("betas[2]", betas[2], num_beta_slow_warmup_steps)
                         : start;
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
