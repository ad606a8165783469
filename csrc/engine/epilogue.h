// What becomes of a rule's update, element by element.
//
// An epilogue is a plain struct. It provides
//
//   static constexpr int kIndex                   its place in RuleInfo's tables
//   static constexpr int kOperands                operands that it adds to a row, after the states:
//                                                 the weight, or none
//   static constexpr bool kHasRowSteps            whether each row may have a step of its own
//   bool is_stochastic                            whether 16-bit results are rounded at random
//   static constexpr uint32_t kScalars            how many scalars it has
//   const HostOrDeviceScalar& scalar(uint32_t i) const    each of them
//   Epilogue with_scalars(const double*) const    itself, with their values known
//   bool is_on_device() const                     whether any scalar of it is
//   bool is_skipped() const                       whether nothing is to be done; reads the scalars
//   template <class Real> struct At {
//     At(const Epilogue&)                         once per step; reads the scalars
//     void scale_by(Real)                         once per row: its factor for updates
//     Real before(Real grad, Real weight...) const     -> the gradient that the rule gets
//     Real after(Real update, Real& weight...) const   -> what is stored in the first operand
//     bool stores() const                         whether that is stored at all
//   };
#pragma once

#include "dtypes.h"
#include "host_or_device_scalar.h"

namespace emopt {

// It is stored, times the row's scale. (A scale of 1 changes no bit.)
struct StoreUpdate {
  static constexpr int kIndex = 0;
  static constexpr int kOperands = 0;
  static constexpr bool kHasRowSteps = false;
  static constexpr uint32_t kScalars = 0;
  static constexpr bool is_stochastic = false;

  EMOPT_FN HostOrDeviceScalar scalar(uint32_t) const { return {}; }
  EMOPT_FN StoreUpdate with_scalars(const double*) const { return {}; }
  EMOPT_FN bool is_on_device() const { return false; }
  EMOPT_FN bool is_skipped() const { return false; }

  template <class Real>
  struct At {
    Real scale = 1;

    EMOPT_FN explicit At(const StoreUpdate&) {}
    EMOPT_FN void scale_by(Real factor) { scale = factor; }

    EMOPT_FN Real before(Real grad) const { return grad; }
    EMOPT_FN Real after(Real update) const { return update * scale; }
    EMOPT_FN bool stores() const { return true; }
  };
};

// Infinities become the largest finite numbers of their sign, a NaN any number. By integers, whose
// minimum is one instruction; compilers make four of a comparison of numbers that may be NaN.
EMOPT_FN float without_infinities(float x) {
  const auto bits = bit_cast<int32_t>(x);
  const int32_t below = bits < 0x7f7fffff ? bits : 0x7f7fffff;  // negative numbers are below
  const auto magnitude = static_cast<uint32_t>(below);          // and above, as these
  return bit_cast<float>(magnitude < 0xff7fffffu ? magnitude : 0xff7fffffu);
}
EMOPT_FN double without_infinities(double x) {
  const auto bits = bit_cast<int64_t>(x);
  const int64_t below = bits < 0x7fefffffffffffff ? bits : 0x7fefffffffffffff;
  const auto magnitude = static_cast<uint64_t>(below);
  return bit_cast<double>(magnitude < 0xffefffffffffffffu ? magnitude : 0xffefffffffffffffu);
}

enum class WeightDecay : uint8_t { kDecoupled, kIndependent, kL2, kPalm };

// It is applied to a weight, which the row's last operand holds: that is the parameter itself, or a
// master of it, of which the parameter gets the rounding.
struct ApplyUpdate {
  static constexpr int kIndex = 1;
  static constexpr int kOperands = 1;
  static constexpr bool kHasRowSteps = true;
  static constexpr uint32_t kScalars = 4;

  HostOrDeviceScalar lr;  // 0 leaves the weights as they are, whatever the update is
  HostOrDeviceScalar grad_multiplier{1.0};
  HostOrDeviceScalar grad_scale{1.0};  // gradients are divided by it
  HostOrDeviceScalar found_inf{0.0};   // nothing changes where it is not 0
  double weight_decay = 0.0;
  WeightDecay method = WeightDecay::kDecoupled;
  bool maximize = false;
  bool is_stochastic = false;  // 16-bit parameters are rounded up or down at random
  uint64_t seed = 0;           // for that

  EMOPT_FN const HostOrDeviceScalar& scalar(uint32_t i) const {
    return i == 0 ? lr : i == 1 ? grad_multiplier : i == 2 ? grad_scale : found_inf;
  }
  EMOPT_FN ApplyUpdate with_scalars(const double* values) const {
    ApplyUpdate result = *this;
    result.lr = {values[0]};
    result.grad_multiplier = {values[1]};
    result.grad_scale = {values[2]};
    result.found_inf = {values[3]};
    return result;
  }

  EMOPT_FN bool is_on_device() const {
    return lr.is_on_device() || grad_multiplier.is_on_device() || grad_scale.is_on_device() ||
           found_inf.is_on_device();
  }
  EMOPT_FN bool is_skipped() const { return found_inf.read() != 0.0; }

  template <class Real>
  struct At {
    Real grad_factor, l2, kept, lost, lr;
    bool has_l2, moves;

    EMOPT_FN explicit At(const ApplyUpdate& epilogue) {
      const double rate = epilogue.lr.read();
      const double factor = epilogue.grad_multiplier.read() / epilogue.grad_scale.read();
      const double decay = epilogue.weight_decay;
      // The fraction of a weight that it loses.
      const double fraction = epilogue.method == WeightDecay::kDecoupled     ? rate * decay
                              : epilogue.method == WeightDecay::kIndependent ? decay
                              : epilogue.method == WeightDecay::kPalm        ? rate * rate * decay
                                                                             : 0.0;
      grad_factor = static_cast<Real>(epilogue.maximize ? -factor : factor);
      has_l2 = epilogue.method == WeightDecay::kL2 && decay != 0.0;
      l2 = static_cast<Real>(decay);
      // 1 - fraction would be rounded to 24 bits, of which a small fraction has few.
      const bool is_small = fraction < 0.5;
      kept = static_cast<Real>(is_small ? 1.0 : 1.0 - fraction);
      lost = static_cast<Real>(is_small ? fraction : 0.0);
      lr = static_cast<Real>(rate);
      moves = rate != 0.0;
    }

    EMOPT_FN void scale_by(Real factor) { lr *= factor; }

    EMOPT_FN Real before(Real grad, Real weight) const {
      // -0 is what changes no number, +0 included; 0 times an infinite weight would be NaN.
      return grad_factor * grad + (has_l2 ? l2 * weight : static_cast<Real>(-0.0));
    }

    EMOPT_FN Real after(Real update, Real& weight) const {
      // An infinite weight stays what it is: it loses a finite amount.
      const Real moved = kept * weight - (lost * without_infinities(weight) + lr * update);
      weight = moves ? moved : weight;
      return weight;
    }

    // A parameter that does not move keeps every bit, whatever its master is.
    EMOPT_FN bool stores() const { return moves; }
  };
};

}  // namespace emopt
