// What a rule and its `Step` may provide (rules/rule.h), for the engines' code.
#pragma once

#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "../rules/rule.h"

namespace emopt {

// The sizes of callers' buffers for a rule's hyperparameters and for the constants of a step.
inline constexpr size_t kMaxRuleBytes = 256;
inline constexpr size_t kMaxConstantsBytes = 512;

template <class Rule, class = void>
inline constexpr int kNumStates = 0;
template <class Rule>
inline constexpr int kNumStates<Rule, std::void_t<decltype(Rule::kStates)>> =
    static_cast<int>(std::size(Rule::kStates));

// How each state may be stored; null if none may be stored as codes.
template <class Rule, class = void>
inline constexpr const StateCode* kStateCodesOf = nullptr;
template <class Rule>
inline constexpr const StateCode* kStateCodesOf<Rule, std::void_t<decltype(Rule::kStateCodes)>> =
    Rule::kStateCodes;
// Whether that is not null, which is no constant under sanitizers.
template <class Rule, class = void>
inline constexpr bool kHasStateCodes = false;
template <class Rule>
inline constexpr bool kHasStateCodes<Rule, std::void_t<decltype(Rule::kStateCodes)>> = true;

// Bit i: whether state i may be stored so. (Device code cannot read an array of the host's.)
template <class Rule>
constexpr uint32_t states_with(StateCode code) {
  uint32_t result = 0;
  if constexpr (kHasStateCodes<Rule>) {
    for (int i = 0; i < kNumStates<Rule>; ++i) {
      result |= static_cast<uint32_t>(kStateCodesOf<Rule>[i] == code) << i;
    }
  }
  return result;
}
template <class Rule>
inline constexpr bool kMayHaveCodes =
    (states_with<Rule>(StateCode::kSigned) | states_with<Rule>(StateCode::kUnsigned)) != 0;

inline constexpr int kMaxScalarStates = 4;

template <class Rule, class = void>
inline constexpr int kNumScalarStates = 0;
template <class Rule>
inline constexpr int kNumScalarStates<Rule, std::void_t<decltype(Rule::kScalarStates)>> =
    static_cast<int>(std::size(Rule::kScalarStates));

// The values of a rule's scalar states.
template <class Rule>
EMOPT_FN double* scalars_of(Rule& rule) {
  return rule.scalars;
}

// 0: the rule is not divided into cases.
template <class Rule, class = void>
inline constexpr int kNumCases = 0;
template <class Rule>
inline constexpr int kNumCases<Rule, std::void_t<decltype(Rule::kNumCases)>> = Rule::kNumCases;

template <class Step, class = void>
inline constexpr bool kMayKeepWeight = false;
template <class Step>
inline constexpr bool
    kMayKeepWeight<Step, std::void_t<decltype(std::declval<const Step&>().keeps_weight)>> = true;

// Whether a step leaves weights as they are.
template <class Step>
EMOPT_FN bool keeps_weight(const Step& step) {
  if constexpr (kMayKeepWeight<Step>) {
    return step.keeps_weight;
  } else {
    return false;
  }
}

}  // namespace emopt
