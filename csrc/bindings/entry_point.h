// The function that eager Python calls for a rule.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_symnode.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "operand_checks.h"
#include "operators.h"
#include "python_arguments.h"
#include "tensor_argument.h"

namespace emopt {

inline StepArgumentValue read_step(PyObject* value) {
  if (THPVariable_Check(value)) return {c10::SymInt(0), THPVariable_Unpack(value)};
  if (torch::is_symint(value)) return {py::cast<c10::SymInt>(value), std::nullopt};
  return {c10::SymInt(read_whole_number("step", value, "an int")), std::nullopt};
}

inline at::Tensor read_scalar_state(const char* name, PyObject* value) {
  TORCH_CHECK_TYPE(THPVariable_Check(value), name, " must be a 0-dim tensor of dtype float32, not ",
                   type_name(value));
  // The dispatcher would pass a copy on.
  TORCH_CHECK(!THPVariable_Unpack(value).is_neg(), name,
              " is a lazily negated view; pass resolve_neg() of it");
  return THPVariable_Unpack(value);
}

// The updates created for a call without `out`, and the object to return.
struct NewUpdates {
  std::vector<at::Tensor> tensors;
  py::object python;
};

inline py::object wrapped(const at::Tensor& tensor) {
  auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (!object) throw py::error_already_set();
  return object;
}

inline NewUpdates new_updates(const TensorArgument& grads, const TensorArgument& layout) {
  NewUpdates updates;
  const size_t count = grads.tensors().size();
  updates.tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    check_storage(grads.name(), grads.tensors()[i], i);
    check_storage(layout.name(), layout.tensors()[i], i);
    updates.tensors.push_back(empty_update(grads.tensors()[i], layout.tensors()[i]));
  }
  if (grads.is_single()) {
    updates.python = wrapped(updates.tensors[0]);
    return updates;
  }
  py::list list(count);
  for (size_t i = 0; i < count; ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i),
                    wrapped(updates.tensors[i]).release().ptr());
  }
  updates.python = std::move(list);
  return updates;
}

// Calls a rule. The arguments are the documented ones in their order, scalar states after the other
// ones, then `out`. Returns the update. If the call has passed the dispatcher (`is_dispatched`), it
// gives `out`, and nothing is done and None returned without native kernels for it.
inline py::object update(const RegisteredRule& rule, PyObject* const* arguments, Py_ssize_t count,
                         bool is_dispatched = false) {
  const RuleInfo& info = *rule.info;
  const size_t expected =
      1 + info.num_states + info.num_hyperparameters + info.num_scalar_states + 1;
  TORCH_CHECK_TYPE(static_cast<size_t>(count) == expected, rule.function, " takes ", expected,
                   " arguments, not ", count);
  const SingleTensorCall messages(is_dispatched ? SingleTensorCall::is_active()
                                                : THPVariable_Check(arguments[0]));
  OperatorCall call;
  call.rule.info = &info;

  std::array<std::optional<TensorArgument>, 1 + kMaxStates> read_lists;  // cannot be moved
  const size_t num_read = 1 + info.num_states;
  for (size_t k = 0; k < num_read; ++k) {
    read_lists[k].emplace(k == 0 ? "grad" : info.states[k - 1], arguments[k]);
    call.lists[kGrad + k] = read_lists[k]->tensors();
  }
  const TensorArgument& grads = *read_lists[0];
  for (size_t k = 1; k < num_read; ++k) check_same_kind(grads, *read_lists[k]);

  for (uint32_t i = 0; i < info.num_hyperparameters; ++i) {
    PyObject* const value = arguments[num_read + i];
    if (info.hyperparameters[i].kind == Kind::kStep) call.step = read_step(value);
    read(info.hyperparameters[i], value, call.rule);
  }

  for (uint32_t i = 0; i < info.num_scalar_states; ++i) {
    PyObject* const value = arguments[num_read + info.num_hyperparameters + i];
    call.scalars.push_back(read_scalar_state(info.scalar_states[i].name, value));
  }

  const py::handle out = arguments[expected - 1];
  std::optional<TensorArgument> given;
  NewUpdates fresh;
  if (out.is_none()) {
    fresh = new_updates(grads, *read_lists[num_read > 1 ? 1 : 0]);
    call.lists[kUpdate] = fresh.tensors;
  } else {
    given.emplace("out", out.ptr());
    check_same_kind(grads, *given);
    call.lists[kUpdate] = given->tensors();
  }
  bool is_done = true;
  if (call.lists[kUpdate].empty()) {
    check_call(call);
  } else {
    const py::gil_scoped_release without_gil;
    if (is_dispatched) {
      is_done = compute_if_native(call);
    } else if (!compute_directly(call)) {
      dispatch(rule, call);
    }
  }
  if (!is_done) return py::none();
  return given ? py::reinterpret_borrow<py::object>(out) : std::move(fresh.python);
}

}  // namespace emopt
