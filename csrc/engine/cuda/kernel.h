// The kernels; without nvcc, only the function that advances counters. Independent of torch. A
// rule's kernels are instantiated in its unit, units/<stem>_cuda.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

namespace emopt::cuda {

cudaError_t enqueue(const Advance& counters, cudaStream_t stream);

}  // namespace emopt::cuda

#if defined(__CUDACC__)
#include <new>

#include "chunk.h"
#include "plan.h"

namespace emopt::cuda {

// Two kernels. If the host knows all scalars, instructions read the constants from the kernel's
// arguments, which takes no registers. Otherwise each block reads the scalars and computes the
// constants.
template <class Launch, bool kNeedsSetup>
__global__ void __launch_bounds__(kThreads, Launch::num_blocks(kNeedsSetup))
    sweep(const __grid_constant__ Launch launch) {
  sweep_chunk(launch, blockIdx.x, threadIdx.x, [&](uint32_t row) {
    if constexpr (kNeedsSetup) {
      __shared__ double scalars[Launch::kScalars];
      __shared__ alignas(Setup<Launch>) unsigned char setup[sizeof(Setup<Launch>)];
      const uint32_t i = threadIdx.x;
      // Do this before the first loads of elements: storing the scalars would wait for them.
      if (i < Launch::kScalars) scalars[i] = read_scalar(launch, row, i);
      return [&launch, row] {
        __syncthreads();
        if (threadIdx.x == 0) new (setup) Setup<Launch>(launch, row, scalars);
        __syncthreads();
        return *reinterpret_cast<const Setup<Launch>*>(setup);
      };
    } else {
      return [&launch] { return Setup<Launch>(launch); };
    }
  });
}

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Launch> && sizeof(Launch) <= Launch::kBytes);
  // Not <<<>>>, which copies the arguments and reports errors only through cudaGetLastError().
  void* arguments[] = {const_cast<Launch*>(&launch)};
  const auto kernel = launch.needs_setup ? &sweep<Launch, true> : &sweep<Launch, false>;
  return cudaLaunchKernel(kernel, num_blocks, kThreads, arguments, 0, stream);
}

template <class Rule, class Epilogue, class Real>
int enqueue_rows(const void* rule, const HostOrDeviceScalar& step, const void* epilogue,
                 const void* const* rows, size_t num_rows, const Chip& chip, void* stream) {
  cudaError_t error = cudaSuccess;
  const auto enqueue_launch = [&](const auto& launch, uint32_t num_blocks) {
    error = enqueue(launch, num_blocks, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess;
  };
  plan_rows<Rule, Epilogue, Real>(*static_cast<const Rule*>(rule), step,
                                  *static_cast<const Epilogue*>(epilogue), rows, num_rows, chip,
                                  enqueue_launch);
  return static_cast<int>(error);
}

}  // namespace emopt::cuda

#define EMOPT_CUDA_RULE_WITH(Rule, Epilogue, Real)                                            \
  template int emopt::cuda::enqueue_rows<emopt::Rule, emopt::Epilogue, Real>(                 \
      const void*, const emopt::HostOrDeviceScalar&, const void*, const void* const*, size_t, \
      const emopt::cuda::Chip&, void*);
#define EMOPT_CUDA_RULE(Rule)                     \
  EMOPT_CUDA_RULE_WITH(Rule, StoreUpdate, float)  \
  EMOPT_CUDA_RULE_WITH(Rule, StoreUpdate, double) \
  EMOPT_CUDA_RULE_WITH(Rule, ApplyUpdate, float)  \
  EMOPT_CUDA_RULE_WITH(Rule, ApplyUpdate, double)
#endif
