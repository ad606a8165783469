// An optimizer's step: one call walks the parameters of a group, their gradients and their states,
// and sweeps them. Nothing is kept between calls, so what has been replaced meanwhile is seen.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "operand_checks.h"

namespace emopt {

// A dictionary's value as a tensor; null where there is none.
inline const at::Tensor* tensor_at(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return nullptr;
  }
  return THPVariable_Check(value) ? &THPVariable_Unpack(value) : nullptr;
}

// A string that lives as long as the process, so that looking it up costs no new one.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// A step counter as the optimizers make it: a number of dtype float32, on the CPU.
inline bool is_counter(const at::Tensor& step) {
  return step.is_cpu() && step.scalar_type() == at::kFloat && step.numel() == 1 &&
         step.layout() == at::kStrided && !step.is_inference();
}

// The parameters of a group that have a master, or those that have none.
template <class Rule, bool kHasMaster>
class OptimizerStep {
  using Epilogue = ApplyUpdate<kHasMaster>;
  static constexpr size_t kOperands = kNumOperands<Rule, Epilogue>;
  static constexpr size_t kOwn = kOperands - 1;  // the weight

 public:
  // Adds a parameter, with its gradient and its own state. False, with nothing added, where a state
  // is missing, or a tensor is none that the engine sweeps: it then has to be stepped otherwise.
  bool take(const Rule& rule, const at::Tensor& param, const at::Tensor& grad, PyObject* state) {
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    static const std::array<PyObject*, kNumStates<Rule>> keys = state_keys();
    const at::Tensor* const step = tensor_at(state, step_key);
    if (step == nullptr || !is_counter(*step)) return false;
    Position position;
    position.step = *step;
    position.value = static_cast<double>(*step->template const_data_ptr<float>()) + 1.0;
    position.operands[kUpdate] = param;
    position.operands[kGrad] = grad;
    for (size_t s = 0; s < keys.size(); ++s) {
      const at::Tensor* const value = tensor_at(state, keys[s]);
      if (value == nullptr) return false;
      position.operands[kFirstState + s] = *value;
    }
    const at::Tensor* const weight = kHasMaster ? tensor_at(state, master_key) : &param;
    if (weight == nullptr) return false;
    position.operands[kOwn] = *weight;
    return append(rule, std::move(position));
  }

  // Does the step of all of them. Needs no GIL.
  void sweep(const Rule& rule, const Epilogue& epilogue) {
    for (auto& [value, table] : tables_) cpu::sweep(rule, value, epilogue, table);
    for (Position& position : positions_) {
      *position.step.template mutable_data_ptr<float>() = static_cast<float>(position.value);
      position.step.unsafeGetTensorImpl()->bump_version();
      for (size_t k = 0; k < kOperands; ++k) {
        const bool is_weight_itself = k == kOwn && !kHasMaster;
        if (!is_written<Rule, Epilogue>(static_cast<int>(k)) || is_weight_itself) continue;
        position.operands[k].unsafeGetTensorImpl()->bump_version();
      }
    }
  }

 private:
  struct Position {
    std::array<at::Tensor, kOperands> operands;
    at::Tensor step;
    double value;
  };

  bool append(const Rule& rule, Position position) {
    const at::Tensor& grad = position.operands[kGrad];
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
    for (size_t k = 0; k < kOperands; ++k) {
      const at::Tensor& operand = position.operands[k];
      if (!is_like(operand, grad)) return false;
      row.dtype[k] = to_dtype(operand.scalar_type());
      if (is_read(static_cast<int>(k)) && row.dtype[k] == DType::kFloat64) {
        row.compute = DType::kFloat64;
      }
      row.data[k] = is_written<Rule, Epilogue>(static_cast<int>(k)) || k == kOwn
                        ? operand.mutable_data_ptr()
                        : const_cast<void*>(operand.const_data_ptr());
      if (row.data[k] == nullptr && row.numel != 0) return false;
    }
    tables_[position.value].append(row);
    positions_.push_back(std::move(position));
    return true;
  }

  static std::array<PyObject*, kNumStates<Rule>> state_keys() {
    std::array<PyObject*, kNumStates<Rule>> keys;
    for (size_t s = 0; s < keys.size(); ++s) keys[s] = interned(Rule::kStates[s]);
    return keys;
  }

  std::vector<Position> positions_;
  std::map<double, Table<kOperands>> tables_;  // by the number of the step
};

}  // namespace emopt
