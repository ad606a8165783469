// The CPU engine: sweeps a rule over tables, with PyTorch's threads.
#pragma once

#include "../epilogue.h"
#include "../rule_info.h"
#include "../table.h"

namespace emopt::cpu {

// Uses several threads if the tables are large enough. The results do not depend on the number of
// threads or the instruction set, bit for bit.
template <int kStates, class Epilogue>
void sweep_in_parallel(const RuleInstance& rule, double step, const Epilogue& epilogue,
                       const Table<kNumOperands<kStates, Epilogue>>* tables, size_t count);

}  // namespace emopt::cpu
