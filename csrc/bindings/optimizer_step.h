// An optimizer's step: one call walks the parameters of a group, their gradients and their states,
// and sweeps them. Nothing is kept between calls, so what has been replaced meanwhile is seen.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <deque>
#include <map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "operand_checks.h"

namespace emopt {

// Finds the parameters' states in a dictionary. A tensor's hash is computed by Python code, which
// takes longer than all else that a small parameter needs. But a dictionary keeps the order in
// which states were made, and that is mostly the parameters': so the next one is looked for from
// there on.
class StateWalk {
 public:
  explicit StateWalk(PyObject* dict) : dict_(dict) {}

  // Null where there is none, and where it was found before: a parameter that is in a group twice
  // cannot be stepped twice at a time.
  PyObject* find(PyObject* param) {
    PyObject *key, *value;
    while (is_in_order_ && PyDict_Next(dict_, &next_, &key, &value) != 0) {
      if (key != param) continue;
      found_.push_back(param);
      return value;
    }
    if (is_in_order_) found_before_.insert(found_.begin(), found_.end());
    is_in_order_ = false;  // once past the end, each by its hash
    if (!found_before_.insert(param).second) return nullptr;
    value = PyDict_GetItemWithError(dict_, param);
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* dict_;
  Py_ssize_t next_ = 0;
  bool is_in_order_ = true;
  std::vector<PyObject*> found_;  // in order
  std::unordered_set<PyObject*> found_before_;
};

// A string that lives as long as the process, so that looking it up costs no new one.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// A step counter as the optimizers make it: a number of dtype float32, on the CPU.
inline bool is_counter(const at::Tensor& step) {
  return step.is_cpu() && step.scalar_type() == at::kFloat && step.numel() == 1 &&
         step.layout() == at::kStrided && !step.is_inference();
}

// The gradient, or a copy of it that lies in memory as the parameter does.
inline at::Tensor laid_out_as(const at::Tensor& param, const at::Tensor& grad) {
  const bool is_so = grad.sizes() != param.sizes() || same_strides(grad, param);
  return is_so || !is_plain(grad) ? grad : at::empty_like(param, grad.options()).copy_(grad);
}

// The parameters of a group that have a master, or those that have none.
//
// Tensors are borrowed from their Python objects, which are kept alive: counting references to the
// tensors themselves costs more than all else, since PyTorch counts some of them in Python, too.
// Only of gradients there may be no Python object. Complex numbers are swept as pairs of real ones.
template <class Rule, bool kHasMaster>
class OptimizerStep {
  using Epilogue = ApplyUpdate<kHasMaster>;
  static constexpr size_t kOperands = kNumOperands<Rule, Epilogue>;
  static constexpr size_t kOwn = kOperands - 1;  // the weight

 public:
  // Adds a parameter, with its gradient and its own state. False, with nothing added, where a state
  // is missing, or a tensor is none that the engine sweeps: it then has to be stepped otherwise.
  bool take(const Rule& rule, PyObject* param, PyObject* state) {
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    static const std::array<PyObject*, kNumStates<Rule>> keys = state_keys();
    const size_t num_alive = alive_.size(), num_owned = owned_.size();
    Position position;
    bool is_complete = true;
    const auto keep = [&](PyObject* object) -> const at::Tensor* {
      if (object == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      is_complete &= object != nullptr && THPVariable_Check(object);
      // What is conjugated lazily does not lie in memory as its values are: it cannot be written
      // to.
      if (!is_complete || THPVariable_Unpack(object).is_conj()) {
        is_complete = false;
        return nullptr;
      }
      alive_.push_back(py::reinterpret_borrow<py::object>(object));
      return as_real(THPVariable_Unpack(object));
    };
    position.operands[kUpdate] = keep(param);
    position.step = keep(PyDict_GetItemWithError(state, step_key));
    for (size_t s = 0; s < keys.size(); ++s) {
      position.operands[kFirstState + s] = keep(PyDict_GetItemWithError(state, keys[s]));
    }
    position.operands[kOwn] =
        kHasMaster ? keep(PyDict_GetItemWithError(state, master_key)) : position.operands[kUpdate];
    if (is_complete && is_counter(*position.step)) {
      owned_.push_back(THPVariable_Unpack(param).grad());
      const at::Tensor& grad = *as_real(owned_.back());
      owned_.push_back(laid_out_as(*position.operands[kUpdate], grad));
      position.operands[kGrad] = &owned_.back();
      if (append(rule, position)) return true;
    }
    alive_.resize(num_alive);
    owned_.resize(num_owned);
    return false;
  }

  // Does the step of all of them. Needs no GIL.
  void sweep(const Rule& rule, const Epilogue& epilogue) {
    for (const auto& [value, table] : tables_) cpu::sweep(rule, value, epilogue, table);
    for (const Position& position : positions_) {
      *position.step->template mutable_data_ptr<float>() = static_cast<float>(position.value);
      position.step->unsafeGetTensorImpl()->bump_version();
      for (size_t k = 0; k < kOperands; ++k) {
        if (is_written<Rule, Epilogue>(static_cast<int>(k))) {
          position.operands[k]->unsafeGetTensorImpl()->bump_version();
        }
      }
    }
  }

 private:
  struct Position {
    std::array<const at::Tensor*, kOperands> operands;
    const at::Tensor* step;
    double value;
  };

  const at::Tensor* as_real(const at::Tensor& tensor) {
    if (!tensor.is_complex()) return &tensor;
    owned_.push_back(at::view_as_real(tensor.resolve_conj()));
    return &owned_.back();
  }

  bool append(const Rule& rule, Position& position) {
    const at::Tensor& grad = *position.operands[kGrad];
    if (!grad.is_cpu() || !is_plain(grad)) return false;
    Row<kOperands> row;
    row.scale = 1.0;
    if constexpr (kHasShapeScale<Rule>) {
      if (rule.use_shape_scaling) {
        if (grad.dim() != 2) return false;  // the plain path has the error for it
        row.scale = Rule::shape_scale(grad.size(0), grad.size(1));
      }
    }
    row.numel = grad.numel();
    row.compute = DType::kFloat32;
    const bool is_contiguous = grad.is_contiguous();
    if (!is_contiguous && !grad.is_non_overlapping_and_dense()) return false;
    for (size_t k = 0; k < kOperands; ++k) {
      const at::Tensor& operand = *position.operands[k];
      if (!is_alike(operand, grad)) return false;
      if (is_contiguous ? !operand.is_contiguous() : !same_strides(operand, grad)) return false;
      row.dtype[k] = to_dtype(operand.scalar_type());
      if (is_read(static_cast<int>(k)) && row.dtype[k] == DType::kFloat64) {
        row.compute = DType::kFloat64;
      }
      row.data[k] =
          k == kGrad ? const_cast<void*>(operand.const_data_ptr()) : operand.mutable_data_ptr();
      if (row.data[k] == nullptr && row.numel != 0) return false;
    }
    position.value = static_cast<double>(*position.step->template const_data_ptr<float>()) + 1.0;
    tables_[position.value].append(row);
    positions_.push_back(position);
    return true;
  }

  static std::array<PyObject*, kNumStates<Rule>> state_keys() {
    std::array<PyObject*, kNumStates<Rule>> keys;
    for (size_t s = 0; s < keys.size(); ++s) keys[s] = interned(Rule::kStates[s]);
    return keys;
  }

  std::vector<py::object> alive_;
  std::deque<at::Tensor> owned_;  // positions point into it
  std::vector<Position> positions_;
  std::map<double, Table<kOperands>> tables_;  // by the number of the step
};

}  // namespace emopt
