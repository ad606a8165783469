// The arguments of an optimizer's step: the scalars of the call, and each group's options.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "../engine/epilogue.h"
#include "../engine/rule_info.h"
#include "hyperparameters.h"
#include "python_arguments.h"
#include "python_objects.h"
#include "scalar_argument.h"

namespace emopt {

// The scalars that all groups of a step share.
struct StepScalars {
  ScalarArgument grad_multiplier, grad_scale, found_inf;
};

// A group's options, other than its rule's hyperparameters.
struct GroupOptions {
  ScalarArgument lr;
  ApplyUpdate epilogue;  // without the scalars
  bool has_masters;
  bool has_remainders;  // bfloat16 parameters have remainders instead of master weights
  bool is_capturable;
  bool must_be_native;      // no parameter may remain
  uint32_t first_position;  // of its parameters in the optimizer
  bool makes_all_states;    // also for parameters without a gradient, whose counters advance
  // The group's step count, if it is on the host; its parameters' counters follow it.
  std::optional<double> count;
};

// Must equal the limit in emerging_optimizers/_hyperparameters.py.
inline constexpr double kLowestRate = -1e-12;

// False if the key is missing or its value is `other`.
inline bool flag(py::handle group, PyObject* key, PyObject* other = Py_False) {
  PyObject* const value = find_item(group.ptr(), key);
  if (value == Py_True) return true;
  if (value == Py_False || value == other) return false;
  return value != nullptr && read_flag(PyUnicode_AsUTF8(key), value);
}

inline bool is_text(PyObject* value, const char* text) {
  return PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
}

inline WeightDecay read_method(py::handle value) {
  if (is_text(value.ptr(), "decoupled")) return WeightDecay::kDecoupled;
  if (is_text(value.ptr(), "independent")) return WeightDecay::kIndependent;
  if (is_text(value.ptr(), "l2")) return WeightDecay::kL2;
  if (is_text(value.ptr(), "palm")) return WeightDecay::kPalm;
  TORCH_CHECK_VALUE(false, "Invalid weight_decay_method: ", py::repr(value).cast<std::string>(),
                    "; expected one of 'decoupled', 'independent', 'palm', 'l2'");
}

inline py::object group_item(py::handle group, PyObject* key) {
  PyObject* const value = find_item(group.ptr(), key);
  if (value == nullptr) {
    PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return py::reinterpret_borrow<py::object>(value);
}

// Raises for invalid values.
inline GroupOptions read_options(py::handle group, uint32_t first_position, uint64_t seed) {
  static PyObject* const lr = interned("lr");
  static PyObject* const weight_decay = interned("weight_decay");
  static PyObject* const method = interned("weight_decay_method");
  static PyObject* const maximize = interned("maximize");
  static PyObject* const stochastic_rounding = interned("stochastic_rounding");
  static PyObject* const master_weights = interned("master_weights");
  static PyObject* const remainders = interned("store_param_remainders");
  static PyObject* const capturable = interned("capturable");
  static PyObject* const fused = interned("fused");
  static PyObject* const foreach = interned("foreach");
  static PyObject* const differentiable = interned("differentiable");
  static PyObject* const step = interned("step");
  TORCH_CHECK_VALUE(!flag(group, differentiable), "does not support differentiable=True");
  ApplyUpdate epilogue;
  epilogue.weight_decay = read_number("weight_decay", group_item(group, weight_decay).ptr());
  check_domain("weight_decay", -1, epilogue.weight_decay, Domain::kNonNegative);
  epilogue.method = read_method(group_item(group, method));
  epilogue.maximize = flag(group, maximize);
  epilogue.is_stochastic = flag(group, stochastic_rounding);
  epilogue.seed = seed;
  ScalarArgument rate("lr", group_item(group, lr));
  // Schedulers that end at 0 may get slightly below it by rounding.
  if (!rate.is_on_device() && !(rate.on(kHost).value >= kLowestRate)) {
    check_domain("lr", -1, rate.on(kHost).value, Domain::kNonNegative);
  }
  PyObject* const masters = find_item(group.ptr(), master_weights);
  const bool are_split = masters != nullptr && is_text(masters, "split");
  const bool has_masters = are_split || flag(group, master_weights);
  TORCH_CHECK_VALUE(!has_masters || !epilogue.is_stochastic,
                    "master_weights and stochastic_rounding cannot be combined");
  const bool must_be_native = flag(group, fused, Py_None);
  TORCH_CHECK_VALUE(!flag(group, foreach, Py_None) || !must_be_native,
                    "`fused` and `foreach` cannot be `True` together.");
  // Only groups of emerging_optimizers.megatron have this key; their `step` is a counter.
  const bool is_counted = PyDict_Contains(group.ptr(), remainders) == 1;
  std::optional<double> count;
  if (is_counted) {
    PyObject* const number = find_item(group.ptr(), step);
    if (number != nullptr && PyLong_Check(number)) count = PyLong_AsDouble(number);
  }
  return {std::move(rate),
          epilogue,
          has_masters,
          flag(group, remainders) || are_split,
          flag(group, capturable),
          must_be_native,
          first_position,
          is_counted,
          count};
}

// Raises for invalid values. `keys` has the group's key of each hyperparameter except the step, in
// the rule's order: a string, or (key, index, length) for one number of a sequence.
inline RuleInstance read_rule(const RuleInfo& info, py::handle group, const py::tuple& keys) {
  RuleInstance rule;
  rule.info = &info;
  Py_ssize_t next = 0;
  for (uint32_t i = 0; i < info.num_hyperparameters; ++i) {
    const HyperparameterInfo& wanted = info.hyperparameters[i];
    if (wanted.kind == Kind::kStep) continue;  // counted for each parameter
    PyObject* const key = PyTuple_GetItem(keys.ptr(), next++);
    if (key == nullptr) throw py::error_already_set();
    if (!PyTuple_Check(key)) {
      read(wanted, group_item(group, key).ptr(), rule);
      continue;
    }
    const auto place = py::reinterpret_borrow<py::tuple>(key);
    const auto name = place[0].cast<std::string>();
    const auto numbers = read_numbers(name.c_str(), group_item(group, place[0].ptr()).ptr());
    TORCH_CHECK_VALUE(numbers.size() == place[2].cast<size_t>(), name, " has ", numbers.size(),
                      " values; expected ", place[2].cast<size_t>());
    read(wanted, py::float_(numbers[place[1].cast<size_t>()]).ptr(), rule);
  }
  check_hyperparameters(rule);
  return rule;
}

}  // namespace emopt
