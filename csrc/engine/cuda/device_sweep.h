// The CUDA engine: sweeps a rule over a table's rows on CUDA devices.
#pragma once

#include <vector>

#include "../epilogue.h"
#include "../rule_info.h"
#include "../table.h"

namespace emopt::cuda {

// Uses each device's current stream; returns before the work is done. Advances the rows' counters.
// If a scalar is on a device, all rows must be on it.
template <int kStates, class Epilogue>
void sweep_on_devices(const RuleInstance& rule, const HostOrDeviceScalar& step,
                      const Epilogue& epilogue,
                      const Table<kNumOperands<kStates, Epilogue>>& table);

// Advances the counters and the scalar states of rows (see EnqueueAdvance).
void advance_on_device(const RuleInstance& rule, const HostOrDeviceScalar& step,
                       const HostOrDeviceScalar& found_inf, const RowScalars* rows, size_t num_rows,
                       int8_t device);

// The architectures that the kernels were compiled for: 900 for sm_90.
std::vector<int> compiled_architectures();

}  // namespace emopt::cuda
