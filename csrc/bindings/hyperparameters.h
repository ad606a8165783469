// A rule's hyperparameters: how each kind is read, checked and passed on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/SymInt.h>
#include <torch/csrc/utils/python_stub.h>

#include <optional>
#include <string>

#include "../engine/rule_info.h"

namespace emopt {

// The step of a call: a number, or a tensor that has it.
struct StepArgumentValue {
  c10::SymInt step{0};
  std::optional<at::Tensor> tensor;
};

// "float[] betas"
std::string schema_of(const HyperparameterInfo& info);

// Sets a rule's hyperparameter; does nothing for the step, which only entry points read.
void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule);
// Sets a rule's hyperparameter, or the step.
void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule,
          StepArgumentValue& step);
// Back to what an operator is passed.
c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule,
                      const StepArgumentValue& step);

// Raises for hyperparameters that are outside of their domains, or do not go together.
void check_hyperparameters(const RuleInstance& rule);

// The step that a call runs at: its tensor's where there is one. Raises for a value that is no
// whole number, and for one below the rule's lowest; the value of a CUDA tensor is not looked at.
HostOrDeviceScalar checked_step(const RuleInstance& rule, const StepArgumentValue& step);

// 0.9 as "0.9", not as "0.90000000000000002"; 1000000.0 as "1000000".
std::string number_text(double value);

// `index` is the value's place in a sequence; -1 where it is not in one.
void check_domain(const char* name, int index, double value, Domain domain);

}  // namespace emopt
