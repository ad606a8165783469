// What becomes of a rule's update, element by element.
//
// An epilogue is a plain struct. It provides
//
//   static constexpr int kOperands                operands that it adds to a row, after the states
//   static constexpr bool kWritesOwn              whether these are written, beside being read
//   template <class Real> struct At {
//     At(const Epilogue&, double scale)           once per row, whose scale is a factor for updates
//     Real before(Real grad, Real own...) const   -> the gradient that the rule gets
//     Real after(Real update, Real& own...) const -> what is stored in the first operand
//   };
#pragma once

#include "../rules/rule.h"

namespace emopt {

// It is stored, times the row's scale. (A scale of 1 changes no bit.)
struct StoreUpdate {
  static constexpr int kOperands = 0;
  static constexpr bool kWritesOwn = false;

  template <class Real>
  struct At {
    Real scale;

    EMOPT_FN At(const StoreUpdate&, double scale_) : scale(static_cast<Real>(scale_)) {}

    EMOPT_FN Real before(Real grad) const { return grad; }
    EMOPT_FN Real after(Real update) const { return update * scale; }
  };
};

// It is applied to a weight, which the row's last operand holds: that is the parameter itself, or a
// master of it, of which the parameter gets the rounding.
template <bool kHasMaster>
struct ApplyUpdate {
  static constexpr int kOperands = 1;
  static constexpr bool kWritesOwn = kHasMaster;

  double grad_factor;    // loss scale, clipping, and the sign of a maximised objective
  double l2;             // weight decay by way of the gradient
  double weight_factor;  // weight decay of the weight itself, before the update
  double lr;             // 0 leaves the weights as they are, whatever the update is

  template <class Real>
  struct At {
    Real grad_factor, l2, weight_factor, lr, scale;
    bool has_l2, moves;

    EMOPT_FN At(const ApplyUpdate& epilogue, double scale_)
        : grad_factor(static_cast<Real>(epilogue.grad_factor)),
          l2(static_cast<Real>(epilogue.l2)),
          weight_factor(static_cast<Real>(epilogue.weight_factor)),
          lr(static_cast<Real>(epilogue.lr)),
          scale(static_cast<Real>(scale_)),
          has_l2(epilogue.l2 != 0.0),
          moves(epilogue.lr != 0.0) {}

    EMOPT_FN Real before(Real grad, Real weight) const {
      // -0 is what changes no number, +0 included; 0 times an infinite weight would be NaN.
      return grad_factor * grad + (has_l2 ? l2 * weight : static_cast<Real>(-0.0));
    }

    EMOPT_FN Real after(Real update, Real& weight) const {
      const Real moved = weight_factor * weight - lr * (update * scale);
      weight = moves ? moved : weight;
      return weight;
    }
  };
};

#define EMOPT_FOR_EACH_EPILOGUE(APPLY, Rule) \
  APPLY(Rule, StoreUpdate)                   \
  APPLY(Rule, ApplyUpdate<false>)            \
  APPLY(Rule, ApplyUpdate<true>)

}  // namespace emopt
