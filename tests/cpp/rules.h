// All rules, as types and as data.
#pragma once

#include <cstring>

#include "engine/rule_info.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/all.h"
#include "rules/laprop.h"
#include "rules/lion.h"
#include "rules/signum.h"
#include "rules/sim_ademamix.h"

#define EMOPT_DECLARE(Rule)                              \
  extern "C" const emopt::RuleInfo* emopt_rule_##Rule(); \
  inline const emopt::RuleInfo& info_of(const emopt::Rule&) { return *emopt_rule_##Rule(); }
EMOPT_FOR_EACH_RULE(EMOPT_DECLARE)
#undef EMOPT_DECLARE

template <class Rule>
emopt::RuleInstance instance_of(const Rule& rule) {
  emopt::RuleInstance instance{&info_of(rule), {}};
  std::memcpy(instance.bytes, &rule, sizeof(rule));
  return instance;
}

template <class Rule, class Epilogue>
inline constexpr int kNumOperandsOf = emopt::kNumOperands<emopt::kNumStates<Rule>, Epilogue>;

// Each rule, with its flags on and off.
template <class Visit>
void for_each_rule(Visit visit) {
  for (const bool is_on : {true, false}) {
    visit(emopt::Adam{{0.9, 0.999}, true, is_on, 1e-8});
    visit(emopt::AdEMAMix{10, 20, {0.9, 0.999, 0.9999}, 1e-8, is_on, 5.0});
    visit(emopt::LaProp{is_on, {0.9, 0.999}, 1e-8});
    if (is_on) visit(emopt::Lion{0.9, 0.99});  // it has no flags
    visit(emopt::Signum{0.9, true, is_on, false});
    visit(emopt::SimplifiedAdEMAMix{is_on ? 10 : 0, 0.9, {0.9999, 0.999}, 1e-8, true, 2.0});
  }
}
