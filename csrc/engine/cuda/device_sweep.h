// The CUDA engine: sweeps a rule over the rows of a table that are on CUDA devices.
#pragma once

#include <vector>

#include "../epilogue.h"
#include "../rule_info.h"
#include "../table.h"

namespace emopt::cuda {

// On each device's current stream; returns before the work is done. Scalars on a device are read
// there, and all rows must then be on that device. Advances the rows' counters.
template <int kStates, class Epilogue>
void sweep_on_devices(const RuleInstance& rule, const HostOrDeviceScalar& step,
                      const Epilogue& epilogue,
                      const Table<kNumOperands<kStates, Epilogue>>& table);

// The architectures that the kernels were compiled for: 900 for sm_90.
std::vector<int> compiled_architectures();

}  // namespace emopt::cuda
