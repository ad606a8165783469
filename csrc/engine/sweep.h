// Hands the rows of a table to the engines of their devices.
#pragma once

#include "cpu/sweep.h"
#if EMOPT_CUDA
#include "cuda/device_sweep.h"
#endif

namespace emopt {

// The step may be on a device only where all rows are.
template <class Rule>
void sweep(const Rule& rule, const StepSource& step, const Table<kNumOperands<Rule>>& table) {
#if EMOPT_CUDA
  if (table.any_on_device) {
    cuda::sweep(rule, step, table);  // returns at once, so that both kinds of device work
    if (!table.any_on_host) return;
    Table<kNumOperands<Rule>> on_host;
    for (const auto& row : table.rows) {
      if (row.device == kHost) on_host.append(row);
    }
    return cpu::sweep(rule, step.value, StoreUpdate(), on_host);
  }
#endif
  cpu::sweep(rule, step.value, StoreUpdate(), table);
}

}  // namespace emopt
