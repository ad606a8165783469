// Adam: A Method for Stochastic Optimization, arXiv:1412.6980. The Nesterov form is that of NAdam
// without its momentum schedule. AMSGrad: On the Convergence of Adam and Beyond, arXiv:1904.09237.
#pragma once

#include "schedules.h"

namespace emopt {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kUnsigned};

  double betas[2];
  bool correct_bias;
  bool use_nesterov;
  double eps;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("betas", &Adam::betas, Domain::kBeta),
                           hyperparameter("correct_bias", &Adam::correct_bias),
                           hyperparameter("use_nesterov", &Adam::use_nesterov), StepArgument{},
                           hyperparameter("eps", &Adam::eps));
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> first, second;
    Real unbias_first, look_ahead, look_now, eps;
    bool use_nesterov;

    EMOPT_FN Step(const Adam& rule, double step)
        : first(rule.betas[0]), second(rule.betas[1]), use_nesterov(rule.use_nesterov) {
      const double c1 = bias_correction(rule.betas[0], step, rule.correct_bias);
      const double c1_next =
          bias_correction(rule.betas[0], step + 1.0, rule.correct_bias && use_nesterov);
      const double root = root_of_correction(rule.betas[1], step, rule.correct_bias);
      unbias_first = static_cast<Real>(root / c1);
      look_ahead = static_cast<Real>(root * rule.betas[0] / c1_next);
      look_now = static_cast<Real>(root * (1.0 - rule.betas[0]) / c1);
      eps = static_cast<Real>(root * rule.eps);
    }

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      average(grad, exp_avg, exp_avg_sq);
      return normalize(grad, exp_avg, exp_avg_sq);
    }

    EMOPT_FN void average(Real grad, Real& exp_avg, Real& exp_avg_sq) const {
      exp_avg = first(exp_avg, grad);
      exp_avg_sq = second.of_square(exp_avg_sq, grad);
    }

    EMOPT_FN Real normalize(Real grad, Real exp_avg, Real square) const {
      // sqrt(c2) m_hat, with m_hat = b1 m / c1' + (1 - b1) g / c1   or   m / c1
      const Real exp_avg_hat =
          use_nesterov ? look_ahead * exp_avg + look_now * grad : unbias_first * exp_avg;
      return exp_avg_hat / (square_root(square) + eps);
    }
  };
};

// Divides by the largest average so far. Like torch.optim, it corrects the bias after that.
struct AMSGrad : Adam {
  static constexpr const char* kName = "amsgrad";
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kSigned, StateCode::kNone,
                                              StateCode::kNone};

  template <class Real>
  struct Step : Adam::Step<Real> {
    EMOPT_FN Step(const AMSGrad& rule, double step) : Adam::Step<Real>(rule, step) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg, Real& exp_avg_sq,
                             Real& max_exp_avg_sq) const {
      this->average(grad, exp_avg, exp_avg_sq);
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      return this->normalize(grad, exp_avg, max_exp_avg_sq);
    }
  };
};

}  // namespace emopt
