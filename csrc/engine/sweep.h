// Passes the rows of a table to the engines of their devices.
#pragma once

#include "cpu/sweep.h"
#if EMOPT_CUDA
#include "cuda/device_sweep.h"
#endif

namespace emopt {

// The step and the epilogue's scalars may be on a device only where all rows are. A row's step
// counter, on its device, counts finished steps and overrides `step`.
template <int kStates, class Epilogue>
void sweep(const RuleInstance& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
           const Table<kNumOperands<kStates, Epilogue>>& table) {
#if EMOPT_CUDA
  if (table.any_on_device) {
    // Returns before the work is done, so that devices and host work at the same time.
    cuda::sweep_on_devices<kStates>(rule, step, epilogue, table);
    if (!table.any_on_host) return;
    Table<kNumOperands<kStates, Epilogue>> on_host;
    for (const auto& row : table.rows) {
      if (row.device == kHost) on_host.append(row);
    }
    return cpu::sweep_in_parallel<kStates>(rule, step.value, epilogue, on_host);
  }
#endif
  cpu::sweep_in_parallel<kStates>(rule, step.value, epilogue, table);
}

}  // namespace emopt
