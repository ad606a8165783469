// Enqueues kernels; without nvcc, only those that advance counters. Independent of torch. A rule's
// kernels are instantiated in its unit, units/<stem>_cuda.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

namespace emopt::cuda {

cudaError_t enqueue(const Advance& counters, cudaStream_t stream);

}  // namespace emopt::cuda

#if defined(__CUDACC__)
#include "../rule_info.h"
#include "plan.h"
#include "sweep_kernel.h"

namespace emopt::cuda {

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Launch> && sizeof(Launch) <= Launch::kBytes);
  // Not <<<>>>, which copies the arguments and reports errors only through cudaGetLastError().
  void* arguments[] = {const_cast<Launch*>(&launch)};
  auto kernel = &sweep<Launch, true>;
  if constexpr (!Launch::kHasCodes) {  // which need a setup
    if (!launch.needs_setup) kernel = &sweep<Launch, false>;
  }
  return cudaLaunchKernel(kernel, num_blocks, kThreads, arguments, 0, stream);
}

template <class Rule, class Epilogue, class Real, bool kHasCodes>
int enqueue_rows(const RuleInstance& rule, const HostOrDeviceScalar& step, const void* epilogue,
                 const void* const* rows, size_t num_rows, const Chip& chip, void* stream) {
  cudaError_t error = cudaSuccess;
  if constexpr (!kHasCodes || kMayHaveCodes<Rule>) {  // of other rules, never called
    const auto enqueue_launch = [&](const auto& launch, uint32_t num_blocks) {
      error = enqueue(launch, num_blocks, static_cast<cudaStream_t>(stream));
      return error == cudaSuccess;
    };
    plan_rows<Rule, Epilogue, Real, kHasCodes>(*reinterpret_cast<const Rule*>(rule.bytes), step,
                                               *static_cast<const Epilogue*>(epilogue), rows,
                                               num_rows, chip, enqueue_launch);
  }
  return static_cast<int>(error);
}

}  // namespace emopt::cuda

#define EMOPT_CUDA_RULE_WITH(Rule, ...)                                          \
  template int emopt::cuda::enqueue_rows<emopt::Rule, emopt::__VA_ARGS__>(       \
      const emopt::RuleInstance&, const emopt::HostOrDeviceScalar&, const void*, \
      const void* const*, size_t, const emopt::cuda::Chip&, void*);
#define EMOPT_CUDA_RULE(Rule)                     \
  EMOPT_CUDA_RULE_WITH(Rule, StoreUpdate, float)  \
  EMOPT_CUDA_RULE_WITH(Rule, StoreUpdate, double) \
  EMOPT_CUDA_RULE_WITH(Rule, ApplyUpdate, float)  \
  EMOPT_CUDA_RULE_WITH(Rule, ApplyUpdate, double) \
  EMOPT_CUDA_RULE_WITH(Rule, ApplyUpdate, float, true)
#endif
