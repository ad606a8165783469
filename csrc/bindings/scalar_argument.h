// A number from Python: a float, or a tensor of one element.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "../engine/epilogue.h"
#include "operand_checks.h"
#include "python_arguments.h"
#include "python_objects.h"

namespace emopt {

// The value of a CUDA tensor is not read: that would synchronize with the device.
class ScalarArgument {
 public:
  ScalarArgument(const char* name, py::handle value) {
    if (!is_tensor(value.ptr())) {
      number_.value = read_number(name, value.ptr());
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

  // `none` is the value for None.
  ScalarArgument(const char* name, py::handle value, double none)
      : ScalarArgument(value.is_none() ? ScalarArgument(none) : ScalarArgument(name, value)) {}

  bool is_on_device() const { return !on_device_.empty(); }

  // The number for kernels on `device`. A CUDA tensor of another device is copied there, once.
  HostOrDeviceScalar on(int8_t device) {
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

 private:
  explicit ScalarArgument(double number) : number_{number} {}

  HostOrDeviceScalar number_;
  std::vector<at::Tensor> on_device_;  // the tensor, and its copies on other devices
};

}  // namespace emopt
