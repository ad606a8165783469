// Evaluates the step's part of a program, in double.
#pragma once

#include <string>

#include "../program.h"

namespace emopt::cpu {

using StepFunction = double (*)(double a, double b, double c);

// The function of an operation, by its name in traces (_user_rules/graph.py); null if there is
// none.
StepFunction step_function(const std::string& name);

// A RuleInfo::make_constants for rules with a program.
template <class Real>
void evaluate_step(const RuleInstance& rule, double step, void* constants);

// A RuleInfo::advance for rules with a program.
void advance_scalars(RuleInstance& rule, double step);

}  // namespace emopt::cpu
