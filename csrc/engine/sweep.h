// Passes a table's rows to the engines of their devices.
#pragma once

#include "cpu/sweep.h"
#if EMOPT_CUDA
#include "cuda/device_sweep.h"
#endif

namespace emopt {

// The step and the epilogue's scalars may be on a device only if all rows are. A row's step counter
// is on the row's device, counts finished steps and overrides `step`.
template <int kStates, class Epilogue>
void sweep(const RuleInstance& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
           const Table<kNumOperands<kStates, Epilogue>>& table) {
#if EMOPT_CUDA
  if (table.any_on_device) {
    // Devices first: this returns before the work is done, so devices and host work in parallel.
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
