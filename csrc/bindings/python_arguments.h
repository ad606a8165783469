// What users pass from Python: read, with messages that name the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "hyperparameters.h"

namespace emopt {

// A tensor, or a sequence of tensors.
//
// The tensors are borrowed from their Python objects, which `alive_` keeps: counting a reference to
// each of a thousand tensors, and giving it back, would cost more than all checks of them.
class TensorArgument {
 public:
  TensorArgument(const char* name, py::handle value);
  ~TensorArgument();
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;

  const char* name() const { return name_; }
  bool is_single() const { return is_single_; }
  at::TensorList tensors() const { return tensors_; }

 private:
  const char* name_;
  bool is_single_ = false;
  py::object alive_;
  c10::SmallVector<at::Tensor, 1> tensors_;
};

// All lists, or all single tensors.
void check_same_kind(const TensorArgument& grad, const TensorArgument& other);

double read_number(const char* name, py::handle value);
bool read_flag(const char* name, py::handle value);
std::optional<int64_t> read_warmup_steps(const char* name, py::handle value);
c10::SmallVector<double, 3> read_numbers(const char* name, py::handle value);
StepArgumentValue read_step(py::handle value);

}  // namespace emopt
