// The CUDA units' interface.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "launch.h"

namespace emopt::cuda {

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream);
cudaError_t enqueue(const Advance& counters, cudaStream_t stream);

// 900 for sm_90.
std::vector<int> compiled_architectures();

}  // namespace emopt::cuda
