#include "devices.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <string>
#include <vector>

#include "device_sweep.h"

namespace emopt::cuda {

namespace {

std::string capability(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

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

}  // namespace emopt::cuda
