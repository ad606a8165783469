#include "device_sweep.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "devices.h"
#include "kernel.h"
#include "plan.h"

namespace emopt::cuda {

template <int kStates, class Epilogue>
void sweep_on_devices(const RuleInstance& rule, const HostOrDeviceScalar& step,
                      const Epilogue& epilogue,
                      const Table<kNumOperands<kStates, Epilogue>>& table) {
  const auto enqueue_key = [&](const auto& row, const void* const* rows, size_t num_rows) {
    const EnqueueRows enqueue_rows = rule.info->enqueue_of<Epilogue>(row);
    const c10::cuda::CUDAGuard guard(row.device);
    const int error = enqueue_rows(rule, step, &epilogue, rows, num_rows, chip_of(row.device),
                                   c10::cuda::getCurrentCUDAStream().stream());
    check_launch(static_cast<cudaError_t>(error), row.device);
  };
  const auto enqueue_advance = [](int8_t device, const Advance& advance) {
    const c10::cuda::CUDAGuard guard(device);
    check_launch(enqueue(advance, c10::cuda::getCurrentCUDAStream()), device);
  };
  const auto enqueue_scalars = [&](int8_t device, const std::vector<RowScalars>& rows) {
    if constexpr (Epilogue::kHasRowSteps) {
      advance_on_device(rule, step, epilogue.found_inf, rows.data(), rows.size(), device);
    }
  };
  sweep_table(epilogue, table, enqueue_key, enqueue_advance, enqueue_scalars);
}

void advance_on_device(const RuleInstance& rule, const HostOrDeviceScalar& step,
                       const HostOrDeviceScalar& found_inf, const RowScalars* rows, size_t num_rows,
                       int8_t device) {
  const c10::cuda::CUDAGuard guard(device);
  const int error = rule.info->enqueue_advance(rule, step, found_inf, rows, num_rows, device,
                                               c10::cuda::getCurrentCUDAStream().stream());
  check_launch(static_cast<cudaError_t>(error), device);
}

#define EMOPT_INSTANTIATE(kStates, Epilogue)                                              \
  template void sweep_on_devices<kStates>(const RuleInstance&, const HostOrDeviceScalar&, \
                                          const Epilogue&,                                \
                                          const Table<kNumOperands<kStates, Epilogue>>&);
EMOPT_FOR_EACH_SWEEP(EMOPT_INSTANTIATE)

}  // namespace emopt::cuda
