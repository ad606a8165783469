// The kernels of a rule that are compiled at run time: which ones a call needs, and loading them.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <tuple>
#include <vector>

#include "../engine/program.h"
#include "../engine/rule_info.h"
#if EMOPT_CUDA
#include "../engine/cuda/kernel_table.h"
#endif

namespace emopt {

// Whether a rule's kernels are compiled at run time.
inline bool has_runtime_kernels(const RuleInfo& info) {
  return info.program != nullptr && info.program->kernels != nullptr;
}

// Whether the kernel is loaded that launches with a row need; otherwise notes that it is wanted. A
// launch needs a setup if any of its rows does. Always true of other rules.
template <class Epilogue>
bool has_kernel([[maybe_unused]] const RuleInfo& info, [[maybe_unused]] c10::DeviceIndex device,
                [[maybe_unused]] bool is_double, [[maybe_unused]] bool needs_setup) {
#if EMOPT_CUDA
  if (has_runtime_kernels(info)) {
    return info.program->kernels->has(device,
                                      {Epilogue::kIndex, is_double ? 1 : 0, false, needs_setup});
  }
#endif
  return true;
}

// The same for a row that has codes. False of a rule without such kernels.
inline bool has_kernel_for_codes([[maybe_unused]] const RuleInfo& info,
                                 [[maybe_unused]] c10::DeviceIndex device) {
#if EMOPT_CUDA
  if (has_runtime_kernels(info)) {
    return info.program->kernels->has(device, cuda::KernelKey::codes(false));
  }
#endif
  return info.enqueue_codes != nullptr;
}

// The same for the kernel that advances scalar states. True of a rule without any.
inline bool has_advance_kernel([[maybe_unused]] const RuleInfo& info,
                               [[maybe_unused]] c10::DeviceIndex device) {
#if EMOPT_CUDA
  if (info.num_scalar_states != 0 && has_runtime_kernels(info)) {
    return info.program->kernels->has(device, cuda::KernelKey::advance());
  }
#endif
  return info.num_scalar_states == 0 || info.enqueue_advance != nullptr;
}

#if EMOPT_CUDA
// A kernel as Python names it (_user_rules/cuda_kernels.py): the epilogue, the arithmetic type,
// whether its launches are large, whether they need a setup, and whether states may be codes.
using KernelName = std::tuple<std::string, std::string, bool, bool, bool>;

// Loads a kernel's machine code on a device. `symbol` is its name there.
void attach_kernel(const RuleInfo& info, c10::DeviceIndex device, const KernelName& kernel,
                   const std::string& symbol, const std::string& code);

// The kernels that were wanted since the last call, each with its device.
std::vector<std::pair<int, KernelName>> wanted_kernels(const RuleInfo& info);
#endif

}  // namespace emopt
