// The arguments of an optimizer's step: the scalars of the call, and each group's options.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "../engine/epilogue.h"
#include "../engine/rule_info.h"

namespace emopt {

// A number from Python: a float, or a tensor of one element. CUDA tensors are not read.
class ScalarArgument {
 public:
  ScalarArgument(const char* name, py::handle value);
  // None stands for `none`.
  ScalarArgument(const char* name, py::handle value, double none);

  bool is_on_device() const { return !on_device_.empty(); }

  // The number for work on a device; a CUDA tensor on another one is copied.
  HostOrDeviceScalar on(int8_t device);

 private:
  explicit ScalarArgument(double number) : number_{number} {}

  HostOrDeviceScalar number_;
  std::vector<at::Tensor> on_device_;  // a copy for each device
};

// What all groups of a step have in common.
struct StepScalars {
  ScalarArgument grad_multiplier, grad_scale, found_inf;
};

// A group's options, but for its rule's hyperparameters.
struct GroupOptions {
  ScalarArgument lr;
  ApplyUpdate epilogue;  // without the scalars
  bool has_masters;
  bool has_remainders;  // bfloat16 parameters have split masters
  bool is_capturable;
  bool must_be_native;      // no parameter may remain
  uint32_t first_position;  // of its parameters in the optimizer
  bool makes_all_states;    // also for parameters without a gradient, whose counters advance
  // The group's own count of steps, if it has one on the host; its parameters' counters follow it.
  std::optional<double> count;
};

// Both raise for invalid values. `keys` says where a group has the rule's hyperparameters, without
// the step, in their order: a key, or (key, index, length) for one number of a sequence.
GroupOptions read_options(py::handle group, uint32_t first_position, uint64_t seed);
RuleInstance read_rule(const RuleInfo& info, py::handle group, const py::tuple& keys);

py::object group_item(py::handle group, PyObject* key);

}  // namespace emopt
