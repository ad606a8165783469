// Checks of hyperparameters against the domains that a rule declares for them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>
#include <type_traits>

#include "../engine/operands.h"

namespace emopt {

// 0.9 as "0.9", not as "0.90000000000000002"; 1000000.0 as "1000000".
std::string number_text(double value);

// `index` is the value's place in a sequence; -1 where it is not in one.
void check_domain(const char* name, int index, double value, Domain domain);

// The step that a call runs at: `step_tensor`'s where there is one. Raises for a value that is no
// whole number, and for one below `lowest`; the value of a CUDA tensor is not looked at.
Number checked_step(int64_t step, const std::optional<at::Tensor>& step_tensor, int64_t lowest);

template <class Rule, class Value>
void check_option(const Rule& rule, const Option<Rule, Value>& option) {
  if constexpr (std::is_array_v<Value>) {
    for (size_t i = 0; i < std::extent_v<Value>; ++i) {
      check_domain(option.name, static_cast<int>(i), (rule.*option.member)[i], option.domain);
    }
  } else if constexpr (!std::is_same_v<Value, bool>) {
    check_domain(option.name, -1, static_cast<double>(rule.*option.member), option.domain);
  }
}

template <class Rule>
void check_option(const Rule&, StepArgument) {}

template <class Rule, class = void>
inline constexpr bool kHasProblem = false;
template <class Rule>
inline constexpr bool kHasProblem<Rule, std::void_t<decltype(&Rule::problem)>> = true;

template <class Rule, class = void>
inline constexpr bool kHasBiasCorrection = false;
template <class Rule>
inline constexpr bool kHasBiasCorrection<Rule, std::void_t<decltype(&Rule::correct_bias)>> = true;

template <class Rule>
void check_hyperparameters(const Rule& rule) {
  std::apply([&](const auto&... options) { (check_option(rule, options), ...); }, Rule::options());
  if constexpr (kHasProblem<Rule>) {
    const std::string problem = rule.problem();
    TORCH_CHECK_VALUE(problem.empty(), problem);
  }
}

// Bias correction divides by 1 - beta^step, so with it steps count from 1.
template <class Rule>
int64_t lowest_step(const Rule& rule) {
  if constexpr (kHasBiasCorrection<Rule>) return rule.correct_bias ? 1 : 0;
  return 0;
}

}  // namespace emopt
