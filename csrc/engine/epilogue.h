// Epilogues: what is done with a rule's update of each element. It is stored or applied to a
// weight.
//
// An epilogue is a struct that provides
//
//   static constexpr int kIndex                   its index in RuleInfo's tables
//   static constexpr int kOperands                the number of operands that it adds to a row
//   after
//                                                 the states: 1 for the weight, or 0
//   static constexpr bool kHasRowSteps            whether rows may have step counters
//   bool is_stochastic                            whether 16-bit results are rounded stochastically
//   static constexpr uint32_t kScalars            the number of its scalars
//   const HostOrDeviceScalar& scalar(uint32_t i) const    the i-th scalar
//   Epilogue with_scalars(const double*) const    a copy whose scalars have these values
//   bool is_on_device() const                     whether any scalar is on a device
//   bool is_skipped() const                       whether the step is a no-op; reads the scalars
//   template <class Real> struct At {
//     At(const Epilogue&)                         once per step; reads the scalars
//     void hold()                                 this step has no update: leaves weights as is
//     void scale_by(Real)                         once per row: the row's factor for updates
//     Real before(Real grad, Real weight...) const     -> the gradient that the rule gets
//     Real after(Real update, Real& weight...) const   -> the value for the first operand
//     bool stores() const                         whether that is stored
//   };
#pragma once

#include "dtypes.h"
#include "host_or_device_scalar.h"

namespace emopt {

// Stores the update times the row's scale. (A scale of 1 is exact.)
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
    EMOPT_FN void hold() {}  // the update is 0
    EMOPT_FN void scale_by(Real factor) { scale = factor; }

    EMOPT_FN Real before(Real grad) const { return grad; }
    EMOPT_FN Real after(Real update) const { return update * scale; }
    EMOPT_FN bool stores() const { return true; }
  };
};

// Clamps infinities to the largest finite value of their sign; the result for a NaN is unspecified.
// Uses integers, whose minimum is one instruction: compilers need four for floats that may be NaN.
EMOPT_FN float without_infinities(float x) {
  const auto bits = bit_cast<int32_t>(x);
  const int32_t below = bits < 0x7f7fffff ? bits : 0x7f7fffff;  // negative floats are below
  const auto magnitude = static_cast<uint32_t>(below);          // and above, as unsigned
  return bit_cast<float>(magnitude < 0xff7fffffu ? magnitude : 0xff7fffffu);
}
EMOPT_FN double without_infinities(double x) {
  const auto bits = bit_cast<int64_t>(x);
  const int64_t below = bits < 0x7fefffffffffffff ? bits : 0x7fefffffffffffff;
  const auto magnitude = static_cast<uint64_t>(below);
  return bit_cast<double>(magnitude < 0xffefffffffffffffu ? magnitude : 0xffefffffffffffffu);
}

enum class WeightDecay : uint8_t { kDecoupled, kIndependent, kL2, kPalm };

// Applies the update to the weight, the row's last operand: the parameter, or its master weight,
// which is then rounded to the parameter.
struct ApplyUpdate {
  static constexpr int kIndex = 1;
  static constexpr int kOperands = 1;
  static constexpr bool kHasRowSteps = true;
  static constexpr uint32_t kScalars = 4;

  HostOrDeviceScalar lr;  // 0 leaves the weights unchanged, even if the update is NaN
  HostOrDeviceScalar grad_multiplier{1.0};
  HostOrDeviceScalar grad_scale{1.0};  // gradients are divided by it
  HostOrDeviceScalar found_inf{0.0};   // nonzero makes the step a no-op
  double weight_decay = 0.0;
  WeightDecay method = WeightDecay::kDecoupled;
  bool maximize = false;
  bool is_stochastic = false;  // rounds 16-bit parameters stochastically
  uint64_t seed = 0;           // of the stochastic rounding

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
      // The fraction that weight decay subtracts.
      const double fraction = epilogue.method == WeightDecay::kDecoupled     ? rate * decay
                              : epilogue.method == WeightDecay::kIndependent ? decay
                              : epilogue.method == WeightDecay::kPalm        ? rate * rate * decay
                                                                             : 0.0;
      grad_factor = static_cast<Real>(epilogue.maximize ? -factor : factor);
      has_l2 = epilogue.method == WeightDecay::kL2 && decay != 0.0;
      l2 = static_cast<Real>(decay);
      // 1 - fraction in Real would lose the low bits of a small fraction.
      const bool is_small = fraction < 0.5;
      kept = static_cast<Real>(is_small ? 1.0 : 1.0 - fraction);
      lost = static_cast<Real>(is_small ? fraction : 0.0);
      lr = static_cast<Real>(rate);
      moves = rate != 0.0;
    }

    EMOPT_FN void hold() { moves = false; }
    EMOPT_FN void scale_by(Real factor) { lr *= factor; }

    EMOPT_FN Real before(Real grad, Real weight) const {
      // Adding -0 is exact, even to -0; 0 times an infinite weight would be NaN.
      return grad_factor * grad + (has_l2 ? l2 * weight : static_cast<Real>(-0.0));
    }

    EMOPT_FN Real after(Real update, Real& weight) const {
      // An infinite weight must stay infinite, so subtract a finite value.
      const Real moved = kept * weight - (lost * without_infinities(weight) + lr * update);
      weight = moves ? moved : weight;
      return weight;
    }

    // An unchanged parameter keeps its bits, even if its master weight rounds to different ones.
    EMOPT_FN bool stores() const { return moves; }
  };
};

}  // namespace emopt
