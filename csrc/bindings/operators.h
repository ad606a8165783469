// The operator of a rule, made from its RuleInfo: its schema and its kernels.
//
//   adam_update_(Tensor(a!)[] updates, Tensor[] grads, Tensor(b!)[] exp_avgs,
//                Tensor(c!)[] exp_avg_sqs, float[] betas, bool correct_bias, bool use_nesterov,
//                SymInt step, float eps, *, Tensor? step_tensor=None) -> ()
//
// `step_tensor`, if given, replaces `step`. A rule's scalar states come after its hyperparameters,
// as 0-dim tensors: `Tensor(d!) mu_product`.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <string>

#include "../engine/rule_info.h"
#include "hyperparameters.h"

namespace emopt {

// The namespace of the package's operators.
inline constexpr const char* kNamespace = "emerging_optimizers";

// A rule and its registered operator.
struct RegisteredRule {
  const RuleInfo* info;
  std::string name;      // the stem of the operator: "<name>_update_"
  std::string function;  // what users call, for messages: "calculate_adam_update"
  c10::OperatorHandle handle;

  size_t num_lists() const { return kFirstState + info->num_states; }
};

// Registers a rule's operator. Raises, before it registers anything, if its name is taken. In a
// namespace other than the package's, `name` is that of the function that users call.
RegisteredRule register_rule(const RuleInfo& info, const std::string& name_space = kNamespace,
                             const std::string& name = "");

// A call of an operator.
struct OperatorCall {
  RuleInstance rule;
  StepArgumentValue step;
  // The updates, the gradients, and the rule's states.
  std::array<at::TensorList, kFirstState + kMaxStates> lists{};
  // As many as the rule has.
  c10::SmallVector<at::Tensor, kMaxScalarStates> scalars;
};

// Raises for invalid hyperparameters; returns the step.
HostOrDeviceScalar check_call(const OperatorCall& call);

// Computes without the dispatcher if nothing needs it: no mode, profiler or transform is active,
// and all tensors are plain and on devices with native kernels. Otherwise does nothing and returns
// false.
bool compute_directly(const OperatorCall& call);
// The same for a call that has passed the dispatcher.
bool compute_if_native(const OperatorCall& call);
// Computes through the dispatcher.
void dispatch(const RegisteredRule& rule, const OperatorCall& call);

// Raises. torch.jit.trace records only PyTorch's built-in operators: its graph would allocate the
// result of a call and never fill it.
[[noreturn]] void refuse_trace(const std::string& what);

}  // namespace emopt
