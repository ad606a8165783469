// What an optimizer's step is asked for: the numbers of the call, and each group's options.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "../engine/epilogue.h"
#include "../engine/rule_info.h"

namespace emopt {

// A number that Python passes: a float, or a tensor of one element, read here only on the CPU.
class ScalarArgument {
 public:
  ScalarArgument(const char* name, py::handle value);
  // None is the number `none`.
  ScalarArgument(const char* name, py::handle value, double none);

  bool is_on_device() const { return !on_device_.empty(); }

  // The number for work on a device; copied there where it is on another one.
  HostOrDeviceScalar on(int8_t device);

 private:
  explicit ScalarArgument(double number) : number_{number} {}

  HostOrDeviceScalar number_;
  std::vector<at::Tensor> on_device_;  // one for each device that was asked for
};

// What all groups of a step share.
struct StepScalars {
  ScalarArgument grad_multiplier, grad_scale, found_inf;
};

// How a group is stepped, beside its rule.
struct GroupOptions {
  ScalarArgument lr;
  ApplyUpdate epilogue;  // but for the scalars
  bool has_masters;
  bool has_remainders;  // bfloat16 parameters and remainders are split masters
  bool is_capturable;
  bool must_be_native;      // all of it
  uint32_t first_position;  // of its parameters in the optimizer
  bool makes_all_states;    // also of parameters without a gradient, which count as the others do
  // The steps that the group has counted, where the host knows; parameters' counters follow.
  std::optional<double> count;
};

// Both raise for values that are none. `keys` says where a group has the rule's hyperparameters,
// but for the step, in their order: a key; or (key, index, length), of numbers that are there.
GroupOptions read_options(py::handle group, uint32_t first_position, uint64_t seed);
RuleInstance read_rule(const RuleInfo& info, py::handle group, const py::tuple& keys);

py::object group_item(py::handle group, PyObject* key);

}  // namespace emopt
