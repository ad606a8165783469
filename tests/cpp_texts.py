"""The C++ texts of rules that tests load."""

BLEND = """\
#include "rules/schedules.h"

namespace emopt {

struct Blend {
  static constexpr const char* kName = "blend";
  static constexpr const char* kStates[] = {"exp_avg"};

  double beta;
  bool correct_bias;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("beta", &Blend::beta, Domain::kBeta),
                           hyperparameter("correct_bias", &Blend::correct_bias), StepArgument{});
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> average;
    Real unbias;

    EMOPT_FN Step(const Blend& rule, double step)
        : average(rule.beta),
          unbias(static_cast<Real>(1.0 / bias_correction(rule.beta, step, rule.correct_bias))) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg) const {
      exp_avg = average(exp_avg, grad);
      return unbias * exp_avg;
    }
  };
};

}  // namespace emopt
"""
# Without states and steps, in the global namespace.
SCALED = """\
struct Scaled {
  static constexpr const char* kName = "scaled";
  double low, high;
  bool use_shape_scaling;
  static constexpr auto hyperparameters() {
    using emopt::hyperparameter;
    return std::make_tuple(hyperparameter("low", &Scaled::low),
                           hyperparameter("high", &Scaled::high),
                           hyperparameter("use_shape_scaling", &Scaled::use_shape_scaling));
  }
  void check(emopt::ErrorText& error) const {
    if (low > high) snprintf(error.text, error.capacity, "low is above high");
  }
  static double shape_scale(int64_t rows, int64_t cols) { return double(rows * cols); }
  template <class Real>
  struct Step {
    Real factor;
    EMOPT_FN Step(const Scaled& rule, double) : factor(static_cast<Real>(rule.low + rule.high)) {}
    EMOPT_FN Real operator()(Real grad) const { return factor * grad; }
  };
};
"""
# With a scalar state: the product of all momenta so far.
SCHEDULED = """\
#include "rules/rule.h"

namespace emopt {

struct ScheduledAdam {
  static constexpr const char* kName = "cpp_scheduled_adam";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr ScalarState kScalarStates[] = {{"mu_product", 1.0}};

  double betas[2];
  double scalars[1];

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &ScheduledAdam::betas, Domain::kBeta),
                           StepArgument{});
  }

  void check(ErrorText& error) const {
    if (betas[0] > betas[1]) snprintf(error.text, error.capacity, "the first beta is the larger");
  }

  EMOPT_FN double mu(double step) const { return betas[0] * (1.0 - 0.5 / (1.0 + 0.004 * step)); }

  EMOPT_FN void advance(double step) { scalars[0] *= mu(step); }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> first, second;
    Real ahead, now;

    EMOPT_FN Step(const ScheduledAdam& rule, double step)
        : first(rule.betas[0]), second(rule.betas[1]) {
      ScheduledAdam next = rule;
      next.advance(step);
      const double product = next.scalars[0], mu = rule.mu(step + 1.0);
      ahead = static_cast<Real>(mu / (1.0 - product * mu));
      now = static_cast<Real>((1.0 - rule.mu(step)) / (1.0 - product));
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      exp_avg = first(exp_avg, grad);
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
      return (exp_avg * ahead + grad * now) / (square_root(exp_avg_sq) + Real(1e-8));
    }
  };
};

}  // namespace emopt
"""
