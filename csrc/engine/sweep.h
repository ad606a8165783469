// Passes the rows of tables to the engines of their devices.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/sweep.h"
#if EMOPT_CUDA
#include "cuda/device_sweep.h"
#endif

namespace emopt {

// The step and the epilogue's scalars may be on a device only if all rows are. A row's step counter
// is on the row's device, counts finished steps and overrides `step`.
template <int kStates, class Epilogue>
void sweep(const RuleInstance& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
           const Table<kNumOperands<kStates, Epilogue>>* tables, size_t count) {
#if EMOPT_CUDA
  // The usual case, without copying rows.
  if (count == 1 && tables[0].any_on_device && !tables[0].any_on_host) {
    return cuda::sweep_on_devices<kStates>(rule, step, epilogue, tables[0]);
  }
  const auto is_on_device = [](const auto& table) { return table.any_on_device; };
  if (std::any_of(tables, tables + count, is_on_device)) {
    Table<kNumOperands<kStates, Epilogue>> on_host, on_devices;
    for (size_t i = 0; i < count; ++i) {
      for (const auto& row : tables[i].rows) {
        (row.device == kHost ? on_host : on_devices).append(row);
      }
    }
    // Devices first: this returns before the work is done, so devices and host work in parallel.
    cuda::sweep_on_devices<kStates>(rule, step, epilogue, on_devices);
    if (on_host.rows.empty()) return;
    return cpu::sweep_in_parallel<kStates>(rule, step.value, epilogue, &on_host, 1);
  }
#endif
  cpu::sweep_in_parallel<kStates>(rule, step.value, epilogue, tables, count);
}

}  // namespace emopt
