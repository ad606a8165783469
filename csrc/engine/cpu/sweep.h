// The CPU engine: sweeps a rule over a whole table, by PyTorch's threads.
#pragma once

#include "../epilogue.h"
#include "../rule_info.h"
#include "../table.h"

namespace emopt::cpu {

// Shared out over PyTorch's threads where the table is large enough. The bits do not depend on the
// number of threads, nor on the instruction set.
template <int kStates, class Epilogue>
void sweep_in_parallel(const RuleInstance& rule, double step, const Epilogue& epilogue,
                       const Table<kNumOperands<kStates, Epilogue>>& table);

}  // namespace emopt::cpu
