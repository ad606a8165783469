#include "runtime_kernels.h"

#if EMOPT_CUDA
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "../engine/cuda/erased_enqueue.h"
#include "../engine/epilogue.h"

namespace emopt {

namespace {

constexpr const char* kEpilogues[] = {"StoreUpdate", "ApplyUpdate", "Advance"};
constexpr const char* kReals[kNumPrecisions] = {"float", "double"};
static_assert(StoreUpdate::kIndex == 0 && ApplyUpdate::kIndex == 1);
static_assert(cuda::KernelKey::advance().epilogue == 2);

cuda::KernelKey key_of(const KernelName& kernel) {
  const auto& [epilogue, real, is_large, needs_setup, has_codes] = kernel;
  const auto* const found = std::find(std::begin(kEpilogues), std::end(kEpilogues), epilogue);
  TORCH_INTERNAL_ASSERT(found != std::end(kEpilogues), epilogue);
  return {static_cast<int>(found - kEpilogues), real == kReals[1] ? 1 : 0, is_large, needs_setup,
          has_codes};
}

KernelName name_of(const cuda::KernelKey& key) {
  return {kEpilogues[key.epilogue], kReals[key.precision], key.is_large, key.needs_setup,
          key.has_codes};
}

}  // namespace

void attach_kernel(const RuleInfo& info, c10::DeviceIndex device, const KernelName& kernel,
                   const std::string& symbol, const std::string& code) {
  const c10::DeviceGuard guard({c10::kCUDA, device});
  void* const loaded = cuda::load_kernel(code, symbol.c_str());
  info.program->kernels->add(device, key_of(kernel), loaded);
}

std::vector<std::pair<int, KernelName>> wanted_kernels(const RuleInfo& info) {
  std::vector<std::pair<int, KernelName>> result;
  for (const auto& [device, key] : info.program->kernels->take_wanted()) {
    result.emplace_back(device, name_of(key));
  }
  return result;
}

}  // namespace emopt
#endif
