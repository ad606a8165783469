// A rule in a kernel that is compiled at run time. The layout does not depend on the rule and is
// that of ErasedRule, with which the host fills the launches.
#pragma once

#include "../rule_traits.h"
#include "launch.h"

namespace emopt::cuda {

template <class Rule>
struct PaddedRule {
  const void* info;  // the host's
  union {
    Rule rule;
    alignas(8) unsigned char bytes[kMaxRuleBytes];
  };

  EMOPT_FN void advance(double step) { rule.advance(step); }

  template <class Real>
  struct Step {
    using RuleStep = typename Rule::template Step<Real>;
    union {
      RuleStep step;
      alignas(16) unsigned char bytes[kMaxConstantsBytes];
    };
    bool keeps_weight;

    EMOPT_FN Step(const PaddedRule& padded, double step_)
        : step(padded.rule, step_), keeps_weight(emopt::keeps_weight(step)) {}

    template <class... States>
    EMOPT_FN Real operator()(Real grad, States&... states) const {
      return step(grad, states...);
    }
  };

  static_assert(sizeof(Rule) <= kMaxRuleBytes, "a rule's struct has at most 256 bytes");
  static_assert(sizeof(Step<double>) == kMaxConstantsBytes + 16,
                "the constants of a step have at most 512 bytes");
};

template <class Rule>
EMOPT_FN double* scalars_of(PaddedRule<Rule>& padded) {
  return padded.rule.scalars;
}

template <class Rule>
inline constexpr uint32_t kScalarSlots<PaddedRule<Rule>> =
    kNumScalarStates<Rule> != 0 ? kMaxScalarStates : 0;

}  // namespace emopt::cuda

namespace emopt {

template <class Rule>
inline constexpr int kNumStates<cuda::PaddedRule<Rule>> = kNumStates<Rule>;

template <class Rule>
inline constexpr int kNumScalarStates<cuda::PaddedRule<Rule>> = kNumScalarStates<Rule>;

template <class Rule>
inline constexpr const StateCode* kStateCodesOf<cuda::PaddedRule<Rule>> = kStateCodesOf<Rule>;
template <class Rule>
inline constexpr bool kHasStateCodes<cuda::PaddedRule<Rule>> = kHasStateCodes<Rule>;

}  // namespace emopt
