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
