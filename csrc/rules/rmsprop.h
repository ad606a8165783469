// RMSprop: Tieleman and Hinton, Neural Networks for Machine Learning, lecture 6.5, Coursera 2012.
// The centered form: Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850. Momentum
// is that of torch.optim.RMSprop. There is one struct for each set of states.
#pragma once

#include "rule.h"

namespace emopt {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr const char* kStates[] = {"exp_avg_sq"};
  static constexpr StateCode kStateCodes[] = {StateCode::kUnsigned};

  double alpha;
  double eps;

  static constexpr auto hyperparameters() {
    return std::make_tuple(hyperparameter("alpha", &RMSprop::alpha, Domain::kBeta),
                           hyperparameter("eps", &RMSprop::eps));
  }

  template <class Real>
  struct Step {
    ExponentialMovingAverage<Real> average;
    Real eps;

    EMOPT_FN Step(const RMSprop& rule, double /*step*/)
        : average(rule.alpha), eps(static_cast<Real>(rule.eps)) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg_sq) const {
      return normalize(grad, exp_avg_sq);
    }

    EMOPT_FN Real normalize(Real grad, Real& exp_avg_sq) const {
      exp_avg_sq = average.of_square(exp_avg_sq, grad);
      return grad / (square_root(exp_avg_sq) + eps);
    }

    // Centered: by the standard deviation instead of the root mean square.
    EMOPT_FN Real normalize(Real grad, Real& exp_avg_sq, Real& grad_avg) const {
      exp_avg_sq = average.of_square(exp_avg_sq, grad);
      grad_avg = average(grad_avg, grad);
      return grad / (square_root(exp_avg_sq - grad_avg * grad_avg) + eps);
    }
  };
};

struct RMSpropCentered : RMSprop {
  static constexpr const char* kName = "rmsprop_centered";
  static constexpr const char* kStates[] = {"exp_avg_sq", "grad_avg"};
  static constexpr StateCode kStateCodes[] = {StateCode::kNone, StateCode::kNone};

  template <class Real>
  struct Step : RMSprop::Step<Real> {
    EMOPT_FN Step(const RMSpropCentered& rule, double step) : RMSprop::Step<Real>(rule, step) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg_sq, Real& grad_avg) const {
      return this->normalize(grad, exp_avg_sq, grad_avg);
    }
  };
};

struct RMSpropMomentum : RMSprop {
  static constexpr const char* kName = "rmsprop_momentum";
  static constexpr const char* kStates[] = {"exp_avg_sq", "momentum_buffer"};
  static constexpr StateCode kStateCodes[] = {StateCode::kUnsigned, StateCode::kSigned};

  double momentum;

  static constexpr auto hyperparameters() {
    const auto added = hyperparameter("momentum", &RMSpropMomentum::momentum);
    return std::tuple_cat(RMSprop::hyperparameters(), std::make_tuple(added));
  }

  template <class Real>
  struct Step : RMSprop::Step<Real> {
    Real momentum;

    EMOPT_FN Step(const RMSpropMomentum& rule, double step)
        : RMSprop::Step<Real>(rule, step), momentum(static_cast<Real>(rule.momentum)) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg_sq, Real& momentum_buffer) const {
      return accumulate(momentum_buffer, this->normalize(grad, exp_avg_sq));
    }

    EMOPT_FN Real accumulate(Real& momentum_buffer, Real normalized) const {
      momentum_buffer = momentum * momentum_buffer + normalized;
      return momentum_buffer;
    }
  };
};

struct RMSpropCenteredMomentum : RMSpropMomentum {
  static constexpr const char* kName = "rmsprop_centered_momentum";
  static constexpr const char* kStates[] = {"exp_avg_sq", "grad_avg", "momentum_buffer"};
  static constexpr StateCode kStateCodes[] = {StateCode::kNone, StateCode::kNone,
                                              StateCode::kSigned};

  template <class Real>
  struct Step : RMSpropMomentum::Step<Real> {
    EMOPT_FN Step(const RMSpropCenteredMomentum& rule, double step)
        : RMSpropMomentum::Step<Real>(rule, step) {}

    EMOPT_FN Real operator()(Real grad, Real& exp_avg_sq, Real& grad_avg,
                             Real& momentum_buffer) const {
      return this->accumulate(momentum_buffer, this->normalize(grad, exp_avg_sq, grad_avg));
    }
  };
};

}  // namespace emopt
