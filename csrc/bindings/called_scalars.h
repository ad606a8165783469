// The scalar states of a call: 0-dim tensors, which the call advances.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../engine/sweep.h"
#include "operand_checks.h"
#include "operators.h"
#include "tensor_memory.h"

namespace emopt {

// Of a call that has some.
class CalledScalars {
 public:
  // Raises for tensors of another shape or dtype, on different devices, or that cannot be modified.
  explicit CalledScalars(const OperatorCall& call) : call_(call) {
    for (size_t i = 0; i < count(); ++i) check(i);
  }

  // Reads the values of those on the host. Raises if one shares memory with another tensor.
  void read(RuleInstance& rule, OperandLists lists) {
    for (size_t i = 0; i < count(); ++i) {
      memory_.scalars[i] = static_cast<float*>(call_.scalars[i].mutable_data_ptr());
      TORCH_CHECK_VALUE(memory_.scalars[i] != nullptr, name(i),
                        " has no memory: its storage was resized to 0");
      const double value =
          is_on_device() ? 0.0 : double{*memory_.scalars[i]};  // 0 is replaced there
      rule.set_scalar(static_cast<uint32_t>(i), value);
    }
    refuse_sharing(lists);
  }

  // Those on a device; null if they are on the host.
  RowExtras* on_device() { return is_on_device() ? &memory_ : nullptr; }

  // Replaces them by their values after the step.
  void advance(RuleInstance& rule, [[maybe_unused]] const HostOrDeviceScalar& step) {
    if (is_on_device()) {
#if EMOPT_CUDA
      RowScalars row{nullptr, {}};
      std::copy(std::begin(memory_.scalars), std::end(memory_.scalars), row.scalars);
      cuda::advance_on_device(rule, step, {}, &row, 1, call_.scalars[0].get_device());
#endif
    } else {
      rule.info->advance(rule, step.value);
      for (size_t i = 0; i < count(); ++i) {
        *memory_.scalars[i] = static_cast<float>(rule.scalar(static_cast<uint32_t>(i)));
      }
    }
    for (const at::Tensor& tensor : call_.scalars) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  size_t count() const { return call_.scalars.size(); }
  bool is_on_device() const { return call_.scalars[0].is_cuda(); }
  const char* name(size_t i) const { return call_.rule.info->scalar_states[i].name; }

  void check(size_t i) const {
    const at::Tensor& tensor = call_.scalars[i];
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name(i), " has layout ", tensor.layout(),
                     "; expected a strided (dense) tensor");
    TORCH_CHECK_TYPE(tensor.dim() == 0 && tensor.scalar_type() == at::kFloat, name(i),
                     " is a tensor of dtype ", dtype_text(tensor.scalar_type()), " with ",
                     tensor.dim(), " dimensions; expected a 0-dim tensor of dtype float32");
    TORCH_CHECK_TYPE(tensor.is_cpu() || tensor.is_cuda(), name(i), " is on ", tensor.device(),
                     "; expected a tensor on the CPU or a CUDA device");
    TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), name(i),
                " is an inference tensor, which cannot be modified outside of inference mode");
    const at::Tensor& first = call_.scalars[0];
    TORCH_CHECK_VALUE(tensor.device() == first.device(), name(i), " is on ", tensor.device(),
                      " but ", name(0), " is on ", first.device());
    const auto& step = call_.step.tensor;
    TORCH_CHECK_VALUE(tensor.is_cuda() || !step.has_value() || step->is_cpu(), name(i), " is on ",
                      tensor.device(), " but step is on ", step->device(),
                      "; move it there, since its new value may depend on the step");
  }

  void refuse_sharing(OperandLists lists) const {
    std::vector<UsedMemory> used;
    for (const at::Tensor& tensor : call_.scalars) {
      used.push_back({memory_of_tensor(tensor, address_of(tensor)), true});
    }
    const auto add_other = [&](const at::Tensor& tensor) {
      const void* const address = address_of(tensor);
      if (address != nullptr) used.push_back({memory_of_tensor(tensor, address), false});
    };
    for (const OperandList& list : lists) {
      std::for_each(list.tensors.begin(), list.tensors.end(), add_other);
    }
    if (call_.step.tensor.has_value()) add_other(*call_.step.tensor);
    find_sharing(used, [&](size_t i, size_t, Sharing) {
      TORCH_CHECK_VALUE(false, name(i), " shares memory with another tensor of the call, and is",
                        " modified in place; give it separate memory (.clone())");
    });
  }

  const OperatorCall& call_;
  RowExtras memory_{};
};

}  // namespace emopt
