// The CPU engine: sweeps a rule over a whole table.
#pragma once

#include "unit.h"

namespace emopt::cpu {

// Shared out over PyTorch's threads where the table is large enough. The bits do not depend on the
// number of threads, nor on the instruction set.
template <class Rule, class Epilogue>
void sweep(const Rule& rule, double step, const Epilogue& epilogue,
           const Table<kNumOperands<Rule, Epilogue>>& table);

}  // namespace emopt::cpu
