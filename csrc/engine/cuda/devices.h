// What the engine asks of PyTorch's CUDA devices.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "enqueue_rows.h"

namespace emopt::cuda {

Chip chip_of(int8_t device);

// Raises if a launch failed.
void check_launch(cudaError_t error, int device);

}  // namespace emopt::cuda
