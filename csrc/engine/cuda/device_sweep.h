// The CUDA engine: sweeps a rule over the rows of a table that are on CUDA devices.
#pragma once

#include "../../rules/all.h"
#include "launch.h"

namespace emopt::cuda {

// On each device's current stream; returns before the work is done. What is on a device is read
// there: all rows must then be on that device. Counters that rows have there are advanced.
template <class Rule, class Epilogue>
void sweep(const Rule& rule, const Number& step, const Epilogue& epilogue,
           const Table<kNumOperands<Rule, Epilogue>>& table);

}  // namespace emopt::cuda
