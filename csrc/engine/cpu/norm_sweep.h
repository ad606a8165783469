// The CPU engine's sums of gradients, with PyTorch's threads.
#pragma once

#include "../norm.h"

namespace emopt::cpu {

// Stores the sum of each row's tensor at the row's position. Uses several threads if the table is
// large enough.
void sum_tensors(NormOrder order, const GradTable& table, double* tensor_sums);

}  // namespace emopt::cpu
