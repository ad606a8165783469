// Tensor arguments from Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "operand_checks.h"
#include "python_arguments.h"

namespace emopt {

// A tensor, or a sequence of tensors.
//
// The tensors are borrowed from their Python objects, which `alive_` keeps alive: counting
// references to a thousand tensors would cost more than all their checks.
class TensorArgument {
 public:
  TensorArgument(const char* name, PyObject* value) : name_(name) {
    if (THPVariable_Check(value)) {
      is_single_ = true;
      alive_ = py::reinterpret_borrow<py::object>(value);
      tensors_.push_back(Borrow::createBorrow(THPVariable_Unpack(value)));
      return;
    }
    // A copy: another thread may change the list while this one computes.
    alive_ = py::reinterpret_steal<py::object>(items_of(value));
    TORCH_CHECK_TYPE(alive_, name, " must be a Tensor or a sequence of Tensors, not ",
                     type_name(value));
    const Py_ssize_t count = PyTuple_GET_SIZE(alive_.ptr());
    // Check all before borrowing any: after an exception, no destructor would end the borrowing.
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const item = PyTuple_GET_ITEM(alive_.ptr(), i);
      TORCH_CHECK_TYPE(THPVariable_Check(item), position_name(name, static_cast<size_t>(i)),
                       " must be a Tensor, not ", type_name(item));
    }
    tensors_.reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const item = PyTuple_GET_ITEM(alive_.ptr(), i);
      tensors_.push_back(Borrow::createBorrow(THPVariable_Unpack(item)));
    }
  }
  ~TensorArgument() {
    for (at::Tensor& tensor : tensors_) Borrow::destroyBorrow(tensor);
  }
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;

  const char* name() const { return name_; }
  bool is_single() const { return is_single_; }
  at::TensorList tensors() const { return tensors_; }

 private:
  using Borrow = c10::MaybeOwnedTraits<at::Tensor>;

  const char* name_;
  bool is_single_ = false;
  py::object alive_;
  c10::SmallVector<at::Tensor, 1> tensors_;
};

// Raises unless both are single tensors, or lists of the same length.
inline void check_same_kind(const TensorArgument& grad, const TensorArgument& other) {
  TORCH_CHECK_VALUE(grad.is_single() == other.is_single(), other.name(), " is ",
                    other.is_single() ? "a single Tensor" : "a sequence", " but ", grad.name(),
                    " is ", grad.is_single() ? "a single Tensor" : "a sequence",
                    "; pass all of them as Tensors, or all as sequences of Tensors");
  TORCH_CHECK_VALUE(grad.tensors().size() == other.tensors().size(), list_name(other.name()),
                    " has ", other.tensors().size(), " tensors but ", list_name(grad.name()),
                    " has ", grad.tensors().size());
}

}  // namespace emopt
