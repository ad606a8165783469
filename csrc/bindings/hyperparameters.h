// Reads, checks and passes on a rule's hyperparameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/SymInt.h>
#include <torch/csrc/utils/python_stub.h>

#include <optional>
#include <string>

#include "../engine/rule_info.h"

namespace emopt {

// The step of a call: a number, or a tensor that holds it.
struct StepArgumentValue {
  c10::SymInt step{0};
  std::optional<at::Tensor> tensor;
};

// "float[] betas"
std::string schema_of(const HyperparameterInfo& info);

// Sets a rule's hyperparameter. Ignores the step, which only entry points read.
void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule);
// Sets a rule's hyperparameter, or the step.
void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule,
          StepArgumentValue& step);
// The inverse of the above: the value as an operator's argument.
c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule,
                      const StepArgumentValue& step);

// Raises for hyperparameters that are out of their domains or cannot be combined.
void check_hyperparameters(const RuleInstance& rule);

// The step of a call, from its tensor if it has one. Raises if the value is not an integer or is
// below the rule's lowest step. A CUDA tensor's value is not read, so it is not checked.
HostOrDeviceScalar checked_step(const RuleInstance& rule, const StepArgumentValue& step);

// 0.9 as "0.9", not as "0.90000000000000002"; 1000000.0 as "1000000".
std::string number_text(double value);

// `index` is the value's position in its sequence; -1 if it is not in a sequence.
void check_domain(const char* name, int index, double value, Domain domain);

}  // namespace emopt
