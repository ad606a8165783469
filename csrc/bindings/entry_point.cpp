#include "entry_point.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <utility>
#include <vector>

#include "operand_checks.h"
#include "python_arguments.h"

namespace emopt {

namespace {

struct EntryPoint {
  RegisteredRule rule;
  std::string name;
  PyMethodDef definition;
};

// Updates made for a call without `out`: the tensors, and the object to return.
struct NewUpdates {
  std::vector<at::Tensor> tensors;
  py::object python;
};

py::object wrapped(const at::Tensor& tensor) {
  auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (!object) throw py::error_already_set();
  return object;
}

NewUpdates new_updates(const TensorArgument& grads, const TensorArgument& layout) {
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

py::object update(const RegisteredRule& rule, PyObject* const* arguments) {
  const RuleInfo& info = *rule.info;
  const SingleTensorCall messages(THPVariable_Check(arguments[0]));
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
    read(info.hyperparameters[i], py::handle(arguments[num_read + i]), call.rule, call.step);
  }

  const py::handle out = arguments[num_read + info.num_hyperparameters];
  std::optional<TensorArgument> given;
  NewUpdates fresh;
  if (out.is_none()) {
    fresh = new_updates(grads, *read_lists[num_read > 1 ? 1 : 0]);
    call.lists[kUpdate] = fresh.tensors;
  } else {
    given.emplace("out", out);
    check_same_kind(grads, *given);
    call.lists[kUpdate] = given->tensors();
  }
  if (call.lists[kUpdate].empty()) {
    check_call(call);
  } else {
    const py::gil_scoped_release without_gil;
    if (!compute_directly(call)) dispatch(rule, call);
  }
  return given ? py::reinterpret_borrow<py::object>(out) : std::move(fresh.python);
}

PyObject* enter(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto* entry = static_cast<const EntryPoint*>(PyCapsule_GetPointer(self, nullptr));
  const RuleInfo& info = *entry->rule.info;
  const size_t expected = 1 + info.num_states + info.num_hyperparameters + 1;
  TORCH_CHECK_TYPE(static_cast<size_t>(count) == expected, entry->name, " takes ", expected,
                   " arguments, not ", count);
  return update(entry->rule, arguments).release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace

py::object entry_point(const RegisteredRule& rule) {
  auto* const entry = new EntryPoint{rule, std::string(rule.info->name) + "_update", {}};
  // METH_FASTCALL makes Python call it with `enter`'s signature.
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&enter));
  entry->definition = {entry->name.c_str(), function, METH_FASTCALL, nullptr};
  const py::capsule self(entry);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&entry->definition, self.ptr()));
}

}  // namespace emopt
