// The CUDA engine: sweeps a rule over the rows of a table that are on CUDA devices.
#pragma once

#include <vector>

#include "../../rules/all.h"
#include "launch.h"

namespace emopt::cuda {

// On each device's current stream; returns before the work is done. The step is read on the device
// where its source says so: all rows must then be on that device.
template <class Rule>
void sweep(const Rule& rule, const StepSource& step, const Table<kNumOperands<Rule>>& table);

// 900 for sm_90; empty where the package was built without CUDA.
std::vector<int> compiled_architectures();

}  // namespace emopt::cuda
