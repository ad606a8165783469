// Rules that are not in the package: with the fewest and the most states and scalar states that a
// rule can have, and with all that is optional.
#pragma once

#include "rules/rule.h"
#include "rules/traced.h"

namespace emopt {

// The sign of the gradient.
struct SignDescent {
  static constexpr const char* kName = "sign_descent";

  double threshold;  // smaller gradients count as 0

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("threshold", &SignDescent::threshold));
  }

  template <class Real>
  struct Step {
    Real threshold;

    EMOPT_FN Step(const SignDescent& rule, double /*step*/)
        : threshold(static_cast<Real>(rule.threshold)) {}

    EMOPT_FN Real operator()(Real grad) const {
      return grad > threshold || -grad > threshold ? sign(grad) : Real(0);
    }
  };
};

// Averages of gradients, which drift: they do not stay 0 where gradients are 0.
struct DriftingAverages {
  static constexpr const char* kName = "drifting_averages";
  static constexpr const char* kStates[] = {"first", "second", "third"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kNone,
                                              StateCode::kUnsigned};

  double beta;
  double drift;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("beta", &DriftingAverages::beta, Domain::kBeta),
                           hyperparameter("drift", &DriftingAverages::drift));
  }

  template <class Real>
  struct Step {
    Real beta, drift;

    EMOPT_FN Step(const DriftingAverages& rule, double /*step*/)
        : beta(static_cast<Real>(rule.beta)), drift(static_cast<Real>(rule.drift)) {}

    EMOPT_FN Real operator()(Real grad, Real& first, Real& second, Real& third) const {
      first = beta * first + drift;
      second = beta * second + grad;
      third = beta * third + (drift + grad * grad);
      return first + second;
    }
  };
};

// The sum of five momenta.
struct FiveMomenta {
  static constexpr const char* kName = "five_momenta";
  static constexpr const char* kStates[] = {"first", "second", "third", "fourth", "fifth"};

  double betas[5];

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &FiveMomenta::betas, Domain::kBeta),
                           StepArgument{});
  }

  template <class Real>
  struct Step {
    Real beta[5];
    Real step;

    EMOPT_FN Step(const FiveMomenta& rule, double step_) : step(static_cast<Real>(step_)) {
      for (int i = 0; i < 5; ++i) beta[i] = static_cast<Real>(rule.betas[i]);
    }

    EMOPT_FN Real operator()(Real grad, Real& first, Real& second, Real& third, Real& fourth,
                             Real& fifth) const {
      first = beta[0] * first + grad;
      second = beta[1] * second + grad;
      third = beta[2] * third + grad;
      fourth = beta[3] * fourth + grad;
      fifth = beta[4] * fifth + grad;
      return (first + second + third + fourth + fifth) / step;
    }
  };
};

// Averages gradients, and follows the average once `patience` steps have passed. Three cases: it
// waits, is free, or is clipped.
struct PatientDescent {
  static constexpr const char* kName = "patient_descent";
  static constexpr const char* kStates[] = {"average"};
  static constexpr int kLowestStep = 1;
  static constexpr int kNumCases = 3;

  double beta;
  double patience;
  double limit;  // of the update's magnitude

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("beta", &PatientDescent::beta, Domain::kBeta),
                           hyperparameter("patience", &PatientDescent::patience, Domain::kInteger),
                           optional_hyperparameter("limit", &PatientDescent::limit),
                           StepArgument{});
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> momentum;
    Real limit;
    int which;
    bool keeps_weight;

    EMOPT_FN Step(const PatientDescent& rule, double step)
        : momentum(rule.beta),
          limit(static_cast<Real>(rule.limit)),
          which(step <= rule.patience      ? 0
                : rule.limit != rule.limit ? 1
                                           : 2),
          keeps_weight(which == 0) {}

    template <int kCase>
    EMOPT_FN Real compute(Real grad, Real& average) const {
      average = momentum(average, grad);
      if constexpr (kCase == 0) return Real(0);
      if constexpr (kCase == 1) return average;
      return minimum(maximum(average, -limit), limit);
    }

    EMOPT_FN Real operator()(Real grad, Real& average) const {
      return which == 0   ? compute<0>(grad, average)
             : which == 1 ? compute<1>(grad, average)
                          : compute<2>(grad, average);
    }
  };
};

// NAdam: its momentum follows a schedule, and the product of all momenta so far is a scalar state.
struct ScheduledAdam {
  static constexpr const char* kName = "scheduled_adam";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr ScalarState kScalarStates[] = {{"mu_product", 1.0}};
  static constexpr int kLowestStep = 1;

  double betas[2];
  double momentum_decay;
  double scalars[1];

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &ScheduledAdam::betas, Domain::kBeta),
                           hyperparameter("momentum_decay", &ScheduledAdam::momentum_decay),
                           StepArgument{});
  }

  EMOPT_FN double mu(double step) const {
    return betas[0] * (1.0 - 0.5 * ::pow(0.96, step * momentum_decay));
  }

  EMOPT_FN void advance(double step) { scalars[0] *= mu(step); }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> first, second;
    Real look_ahead, look_now;

    EMOPT_FN Step(const ScheduledAdam& rule, double step)
        : first(rule.betas[0]), second(rule.betas[1]) {
      const double now = rule.mu(step), next = rule.mu(step + 1.0);
      const double product = rule.scalars[0] * now;
      look_ahead = static_cast<Real>(next / (1.0 - product * next));
      look_now = static_cast<Real>((1.0 - now) / (1.0 - product));
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      exp_avg = first(exp_avg, grad);
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
      return (look_ahead * exp_avg + look_now * grad) / (square_root(exp_avg_sq) + Real(1e-8));
    }
  };
};

// Scales the gradient by four running numbers.
struct FourNumbers {
  static constexpr const char* kName = "four_numbers";
  static constexpr ScalarState kScalarStates[] = {
      {"total", 0.0}, {"product", 1.0}, {"last", -1.0}, {"average", 0.5}};

  double scalars[4];
  double rate;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("rate", &FourNumbers::rate), StepArgument{});
  }

  EMOPT_FN void advance(double step) {
    scalars[0] += step;
    scalars[1] *= rate;
    scalars[3] += rate * (scalars[2] - scalars[3]);
    scalars[2] = step;
  }

  template <class Real>
  struct Step {
    Real factor;

    EMOPT_FN Step(const FourNumbers& rule, double step) {
      FourNumbers next = rule;
      next.advance(step);
      double sum = 0.0;
      for (const double value : next.scalars) sum += value;
      factor = static_cast<Real>(sum - 0.25 * rule.scalars[2]);
    }

    EMOPT_FN Real operator()(Real grad) const { return factor * grad; }
  };
};

// One state too many.
struct SixStates {
  static constexpr const char* kName = "six_states";
  static constexpr const char* kStates[] = {"a", "b", "c", "d", "e", "f"};

  static constexpr auto hyperparameters() { return std::make_tuple(); }

  template <class Real>
  struct Step {
    EMOPT_FN Step(const SixStates& /*rule*/, double /*step*/) {}
    EMOPT_FN Real operator()(Real grad, Real&, Real&, Real&, Real&, Real&, Real&) const {
      return grad;
    }
  };
};

}  // namespace emopt
