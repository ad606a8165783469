#include "device_norm.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "devices.h"
#include "norm_kernels.h"

namespace emopt::cuda {

void sum_tensors(NormOrder order, const GradTable& table, double* block_sums, double* tensor_sums) {
  const c10::cuda::CUDAGuard guard(table.device);
  const NormHead head{order, 0, 0, block_sums, tensor_sums};
  plan_norm(head, table, chip_of(table.device), [&](const auto& launch) {
    check_launch(enqueue(launch, c10::cuda::getCurrentCUDAStream()), table.device);
    return true;
  });
}

void add_tensors(NormOrder order, int8_t device, const double* tensor_sums, int64_t num_tensors,
                 double* sum) {
  const c10::cuda::CUDAGuard guard(device);
  const AddTensors arguments{order, tensor_sums, num_tensors, sum};
  check_launch(enqueue(arguments, c10::cuda::getCurrentCUDAStream()), device);
}

}  // namespace emopt::cuda
