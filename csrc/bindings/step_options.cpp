#include "step_options.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <iterator>

#include "hyperparameters.h"
#include "operand_checks.h"
#include "python_arguments.h"
#include "python_objects.h"

namespace emopt {

ScalarArgument::ScalarArgument(const char* name, py::handle value) {
  if (!is_tensor(value.ptr())) {
    number_.value = read_number(name, value);
    return;
  }
  const at::Tensor tensor = THPVariable_Unpack(value.ptr()).resolve_neg();
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " has ", tensor.numel(), " elements; expected 1");
  if (tensor.is_cuda()) {
    TORCH_CHECK_TYPE(is_plain(tensor), name, " must be a number or a plain tensor");
    const bool is_wide = tensor.scalar_type() != at::kFloat;
    on_device_.push_back(is_wide ? tensor.to(at::kDouble) : tensor);
  } else {
    const at::Scalar number = tensor.item();
    const bool is_real = !number.isComplex() || number.toComplexDouble().imag() == 0.0;
    TORCH_CHECK_TYPE(is_real, name, " must be a number, not Tensor");
    number_.value = number.toDouble();
  }
}

ScalarArgument::ScalarArgument(const char* name, py::handle value, double none)
    : ScalarArgument(value.is_none() ? ScalarArgument(none) : ScalarArgument(name, value)) {}

HostOrDeviceScalar ScalarArgument::on(int8_t device) {
  if (!is_on_device()) return number_;
  const auto is_there = [&](const at::Tensor& copy) { return copy.get_device() == device; };
  auto found = std::find_if(on_device_.begin(), on_device_.end(), is_there);
  if (found == on_device_.end()) {
    const at::Device there(at::kCUDA, device);
    on_device_.push_back(on_device_.front().to(there, on_device_.front().scalar_type(), true));
    found = std::prev(on_device_.end());
  }
  using Type = HostOrDeviceScalar::Type;
  const bool is_wide = found->scalar_type() == at::kDouble;
  return {0.0, found->const_data_ptr(), is_wide ? Type::kFloat64 : Type::kFloat32};
}

namespace {

// As emerging_optimizers/_hyperparameters.py has it.
constexpr double kLowestRate = -1e-12;

// False if it is missing or `other`.
bool flag(py::handle group, PyObject* key, PyObject* other = Py_False) {
  PyObject* const value = find_item(group.ptr(), key);
  if (value == Py_True) return true;
  if (value == Py_False || value == other) return false;
  return value != nullptr && read_flag(PyUnicode_AsUTF8(key), value);
}

WeightDecay read_method(py::handle value) {
  const auto is = [&](const char* name) {
    return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), name) == 0;
  };
  if (is("decoupled")) return WeightDecay::kDecoupled;
  if (is("independent")) return WeightDecay::kIndependent;
  if (is("l2")) return WeightDecay::kL2;
  if (is("palm")) return WeightDecay::kPalm;
  TORCH_CHECK_VALUE(false, "Invalid weight_decay_method: ", py::repr(value).cast<std::string>(),
                    "; expected one of 'decoupled', 'independent', 'palm', 'l2'");
}

}  // namespace

py::object group_item(py::handle group, PyObject* key) {
  PyObject* const value = find_item(group.ptr(), key);
  if (value == nullptr) {
    PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return py::reinterpret_borrow<py::object>(value);
}

GroupOptions read_options(py::handle group, uint32_t first_position, uint64_t seed) {
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
  epilogue.weight_decay = read_number("weight_decay", group_item(group, weight_decay));
  check_domain("weight_decay", -1, epilogue.weight_decay, Domain::kNonNegative);
  epilogue.method = read_method(group_item(group, method));
  epilogue.maximize = flag(group, maximize);
  epilogue.is_stochastic = flag(group, stochastic_rounding);
  epilogue.seed = seed;
  ScalarArgument rate("lr", group_item(group, lr));
  // Schedulers reach 0 by sums that rounding takes below it.
  if (!rate.is_on_device() && !(rate.on(kHost).value >= kLowestRate)) {
    check_domain("lr", -1, rate.on(kHost).value, Domain::kNonNegative);
  }
  const bool has_masters = flag(group, master_weights);
  TORCH_CHECK_VALUE(!has_masters || !epilogue.is_stochastic,
                    "master_weights and stochastic_rounding cannot be combined");
  const bool must_be_native = flag(group, fused, Py_None);
  TORCH_CHECK_VALUE(!flag(group, foreach, Py_None) || !must_be_native,
                    "`fused` and `foreach` cannot be `True` together.");
  // Groups of emerging_optimizers.megatron have this key, and a step that counts.
  const bool is_counted = PyDict_Contains(group.ptr(), remainders) == 1;
  std::optional<double> count;
  if (is_counted) {
    PyObject* const number = find_item(group.ptr(), step);
    if (number != nullptr && PyLong_Check(number)) count = PyLong_AsDouble(number);
  }
  return {std::move(rate),
          epilogue,
          has_masters,
          flag(group, remainders),
          flag(group, capturable),
          must_be_native,
          first_position,
          is_counted,
          count};
}

RuleInstance read_rule(const RuleInfo& info, py::handle group, const py::tuple& keys) {
  RuleInstance rule;
  rule.info = &info;
  StepArgumentValue step;  // each parameter has its own
  Py_ssize_t next = 0;
  for (uint32_t i = 0; i < info.num_hyperparameters; ++i) {
    const HyperparameterInfo& wanted = info.hyperparameters[i];
    if (wanted.kind == Kind::kStep) continue;
    PyObject* const key = PyTuple_GetItem(keys.ptr(), next++);
    if (key == nullptr) throw py::error_already_set();
    if (!PyTuple_Check(key)) {
      read(wanted, group_item(group, key), rule, step);
      continue;
    }
    const auto place = py::reinterpret_borrow<py::tuple>(key);
    const auto name = place[0].cast<std::string>();
    const auto numbers = read_numbers(name.c_str(), group_item(group, place[0].ptr()));
    TORCH_CHECK_VALUE(numbers.size() == place[2].cast<size_t>(), name, " has ", numbers.size(),
                      " values; expected ", place[2].cast<size_t>());
    read(wanted, py::float_(numbers[place[1].cast<size_t>()]), rule, step);
  }
  check_hyperparameters(rule);
  return rule;
}

}  // namespace emopt
