// All rules, as types and as RuleInfo.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "engine/rule_info.h"
#include "rules/all.h"

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

// A rule with typical hyperparameters. If `is_on`, all flags and warm-ups are on; otherwise only
// the first of several flags.
template <class Rule>
struct UsualRule {
  Rule rule{};
  int num_flags = 0, num_warmups = 0;

  explicit UsualRule(bool is_on) : is_on_(is_on) {
    std::apply([this](const auto&... each) { (set(each), ...); }, Rule::hyperparameters());
    if (!is_on && num_flags > 1) rule.*first_flag_ = true;
  }

 private:
  const bool is_on_;
  bool Rule::* first_flag_ = nullptr;
  int num_betas_ = 0;

  double next_beta() {
    constexpr double kBetas[] = {0.9, 0.999, 0.9999};
    return kBetas[num_betas_++ % 3];
  }
  void set(emopt::StepArgument) {}
  // `Owner` is the rule, or a base of it.
  template <class Owner>
  void set(const emopt::Hyperparameter<Owner, double>& number) {
    using emopt::Domain;
    rule.*number.member = number.domain == Domain::kBeta          ? next_beta()
                          : number.domain == Domain::kNonNegative ? 1e-8
                                                                  : 2.0;
  }
  template <class Owner, size_t kLength>
  void set(const emopt::Hyperparameter<Owner, double[kLength]>& numbers) {
    for (double& value : rule.*numbers.member) value = next_beta();
  }
  template <class Owner>
  void set(const emopt::Hyperparameter<Owner, bool>& flag) {
    if (num_flags++ == 0) first_flag_ = flag.member;
    rule.*flag.member = is_on_;
  }
  template <class Owner>
  void set(const emopt::Hyperparameter<Owner, int64_t>& warmup) {
    rule.*warmup.member = is_on_ ? 10 * ++num_warmups : 0;
  }
};

// Visits a rule with its flags and warm-ups on, and off.
template <class Rule, class Visit>
void visit_rule(const Visit& visit) {
  const UsualRule<Rule> on(true);
  visit(on.rule);
  if (on.num_flags + on.num_warmups > 0) visit(UsualRule<Rule>(false).rule);
}

template <class Visit>
void for_each_rule(const Visit& visit) {
#define EMOPT_VISIT(Rule) visit_rule<emopt::Rule>(visit);
  EMOPT_FOR_EACH_RULE(EMOPT_VISIT)
#undef EMOPT_VISIT
}
