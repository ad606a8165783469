#include "device_sweep.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "kernel.h"
#include "plan.h"

namespace emopt::cuda {

namespace {

Chip chip_of(int8_t device) {
  static const std::vector<Chip> chips = [] {
    int version = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&version));
    std::vector<Chip> result;
    for (int i = 0; i < c10::cuda::device_count(); ++i) {
      int count = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, i));
      result.push_back({static_cast<uint32_t>(count), version >= 12010});
    }
    return result;
  }();
  return chips.at(static_cast<size_t>(device));
}

std::string capability(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

void check_launch(cudaError_t error, int device) {
  if (error == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();  // clear the error, or a later check reports it again
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    std::string compiled;
    for (const int architecture : compiled_architectures()) {
      compiled += " " + capability(architecture / 100, architecture / 10 % 10);
    }
    TORCH_CHECK(false, "emerging_optimizers was compiled for GPUs of compute capability", compiled,
                ", but cuda:", device, " has ", capability(major, minor),
                "; rebuild it with TORCH_CUDA_ARCH_LIST=", capability(major, minor));
  }
  C10_CUDA_CHECK(error);
}

}  // namespace

template <int kStates, class Epilogue>
void sweep_on_devices(const RuleInstance& rule, const HostOrDeviceScalar& step,
                      const Epilogue& epilogue,
                      const Table<kNumOperands<kStates, Epilogue>>& table) {
  const auto enqueue_key = [&](const auto& row, const void* const* rows, size_t num_rows) {
    const EnqueueRows enqueue_rows = rule.info->enqueue_of<Epilogue>(row.compute);
    const c10::cuda::CUDAGuard guard(row.device);
    const int error = enqueue_rows(rule.bytes, step, &epilogue, rows, num_rows, chip_of(row.device),
                                   c10::cuda::getCurrentCUDAStream().stream());
    check_launch(static_cast<cudaError_t>(error), row.device);
  };
  const auto enqueue_advance = [](int8_t device, const Advance& advance) {
    const c10::cuda::CUDAGuard guard(device);
    check_launch(enqueue(advance, c10::cuda::getCurrentCUDAStream()), device);
  };
  sweep_table(epilogue, table, enqueue_key, enqueue_advance);
}

#define EMOPT_INSTANTIATE(kStates, Epilogue)                                              \
  template void sweep_on_devices<kStates>(const RuleInstance&, const HostOrDeviceScalar&, \
                                          const Epilogue&,                                \
                                          const Table<kNumOperands<kStates, Epilogue>>&);
EMOPT_FOR_EACH_SWEEP(EMOPT_INSTANTIATE)

}  // namespace emopt::cuda
