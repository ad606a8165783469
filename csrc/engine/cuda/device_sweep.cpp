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
    cudaGetLastError();  // or a later check would find it again
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    std::string compiled;
    for (const int architecture : compiled_architectures()) {
      compiled += " " + capability(architecture / 100, architecture / 10 % 10);
    }
    TORCH_CHECK(false, "emerging_optimizers was compiled for GPUs of compute capability", compiled,
                ", but cuda:", device, " has ", capability(major, minor),
                "; compile it again with TORCH_CUDA_ARCH_LIST=", capability(major, minor));
  }
  C10_CUDA_CHECK(error);
}

}  // namespace

template <class Rule, class Epilogue>
void sweep(const Rule& rule, const Number& step, const Epilogue& epilogue,
           const Table<kNumOperands<Rule, Epilogue>>& table) {
  const auto launch_on = [](int8_t device, const auto& launch, auto... num_blocks) {
    const c10::cuda::CUDAGuard guard(device);
    check_launch(enqueue(launch, num_blocks..., c10::cuda::getCurrentCUDAStream()), device);
  };
  for_each_launch(rule, step, epilogue, table, chip_of, launch_on);
  if constexpr (Epilogue::kHasRowSteps) for_each_advance(table, epilogue.found_inf, launch_on);
}

#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)                     \
  template void sweep(const Rule&, const Number&, const Epilogue&, \
                      const Table<kNumOperands<Rule, Epilogue>>&);
#define EMOPT_INSTANTIATE(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_WITH

}  // namespace emopt::cuda
