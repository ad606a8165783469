// A rule in the launches of a kernel that is compiled at run time. It is known only by its
// RuleInfo, so one instantiation of the host's code plans for all rules with a number of states.
// The kernel sees the same bytes as a PaddedRule.
#pragma once

#include "../rule_info.h"
#include "launch.h"

namespace emopt::cuda {

// `kSlots` is the room for scalar states in launches: 0, or kMaxScalarStates if the rule has any.
template <int kStates, uint32_t kSlots>
struct ErasedRule : RuleInstance {
  explicit ErasedRule(const RuleInstance& rule) : RuleInstance(rule) {}

  template <class Real>
  struct Step {
    alignas(16) unsigned char constants[kMaxConstantsBytes];  // the rule's Step
    bool keeps_weight;

    Step(const ErasedRule& rule, double step) {
      rule.info->make_constants[kPrecision<Real>](rule, step, constants);
      const auto keeps = rule.info->keeps_weight[kPrecision<Real>];
      keeps_weight = keeps != nullptr && keeps(constants);
    }
  };
};

}  // namespace emopt::cuda

namespace emopt {

template <int kStates, uint32_t kSlots>
inline constexpr int kNumStates<cuda::ErasedRule<kStates, kSlots>> = kStates;

namespace cuda {

template <int kStates, uint32_t kSlots>
inline constexpr uint32_t kScalarSlots<ErasedRule<kStates, kSlots>> = kSlots;

}  // namespace cuda

}  // namespace emopt
