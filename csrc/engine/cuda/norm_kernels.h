// Enqueues the kernels that add up gradients. Independent of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "norm_launch.h"

namespace emopt::cuda {

// Adds up the blocks of the launch's rows, then each row's tensor.
cudaError_t enqueue(const SmallNormLaunch& launch, cudaStream_t stream);
cudaError_t enqueue(const LargeNormLaunch& launch, cudaStream_t stream);

cudaError_t enqueue(const AddTensors& arguments, cudaStream_t stream);

}  // namespace emopt::cuda
