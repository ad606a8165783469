#include "scalar_checks.h"

#include <charconv>

#include "operand_checks.h"

namespace emopt {

std::string number_text(double value) {
  char text[32];
  const bool is_short_integer = std::abs(value) < 1e16 && std::floor(value) == value;
  const auto end = is_short_integer
                       ? std::to_chars(text, text + sizeof(text), static_cast<int64_t>(value)).ptr
                       : std::to_chars(text, text + sizeof(text), value).ptr;
  return std::string(text, end);
}

void check_domain(const char* name, int index, double value, Domain domain) {
  const bool is_inside = domain == Domain::kBeta          ? value >= 0.0 && value < 1.0
                         : domain == Domain::kNonNegative ? value >= 0.0
                                                          : !std::isnan(value);
  if (is_inside) return;
  const std::string full_name =
      index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
  const std::string expected = domain == Domain::kBeta          ? "0 <= " + full_name + " < 1"
                               : domain == Domain::kNonNegative ? full_name + " >= 0"
                                                                : "a number";
  TORCH_CHECK_VALUE(false, full_name, " is ", number_text(value), "; expected ", expected);
}

Number checked_step(int64_t step, const std::optional<at::Tensor>& step_tensor, int64_t lowest) {
  double value = static_cast<double>(step);
  if (step_tensor.has_value()) {
    TORCH_CHECK_TYPE(step_tensor->dim() == 0 && (step_tensor->scalar_type() == at::kLong ||
                                                 step_tensor->scalar_type() == at::kFloat),
                     "step is a tensor of dtype ", dtype_text(step_tensor->scalar_type()), " with ",
                     step_tensor->dim(),
                     " dimensions; expected an int or a 0-dim tensor of dtype int64 or float32");
    const bool is_int64 = step_tensor->scalar_type() == at::kLong;
    TORCH_CHECK_TYPE(step_tensor->is_cpu() || step_tensor->is_cuda(), "step is on ",
                     step_tensor->device(), "; expected a tensor on the CPU or a CUDA device");
    const void* const address = step_tensor->const_data_ptr();
    if (step_tensor->is_cuda()) {
      return {0.0, address, is_int64 ? Number::Type::kInt64 : Number::Type::kFloat32};
    }
    value = is_int64 ? static_cast<double>(*static_cast<const int64_t*>(address))
                     : static_cast<double>(*static_cast<const float*>(address));
    TORCH_CHECK_VALUE(!std::isnan(value), "step is nan; expected a whole number");
    TORCH_CHECK_TYPE(std::isfinite(value) && std::floor(value) == value, "step is ",
                     number_text(value), "; expected a whole number");
  }
  TORCH_CHECK_VALUE(value >= static_cast<double>(lowest), "step is ", number_text(value),
                    "; expected step >= ", lowest,
                    lowest == 1 ? " (with bias correction, steps count from 1)" : "");
  return {value};
}

}  // namespace emopt
