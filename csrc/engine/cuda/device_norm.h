// The CUDA engine's sums of gradients.
#pragma once

#include "../norm.h"

namespace emopt::cuda {

// Both use the device's current stream, and return before the work is done.

// Stores the sum of each row's tensor at the row's position. All pointers are to the memory of the
// table's device; there is room for the sums of the table's blocks.
void sum_tensors(NormOrder order, const GradTable& table, double* block_sums, double* tensor_sums);

// Stores the sum of all from those of the tensors.
void add_tensors(NormOrder order, int8_t device, const double* tensor_sums, int64_t num_tensors,
                 double* sum);

}  // namespace emopt::cuda
