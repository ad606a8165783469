// The kernel; to a C++ compiler, only how it is enqueued. Sees no torch. Each rule's instances are
// a unit of their own, unit_<stem>.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

namespace emopt::cuda {

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream);
cudaError_t enqueue(const Advance& counters, cudaStream_t stream);

}  // namespace emopt::cuda

#if defined(__CUDACC__)
#include <new>

#include "chunk.h"

namespace emopt::cuda {

// Two kernels: where the host knows all numbers, the constants are operands of instructions, and
// take no registers. Else each block reads the numbers, and reduces them to the constants.
template <class Launch, bool kNeedsSetup>
__global__ void __launch_bounds__(kThreads, Launch::num_blocks(kNeedsSetup))
    sweep(const __grid_constant__ Launch launch) {
  sweep_chunk(launch, blockIdx.x, threadIdx.x, [&](uint32_t row) {
    if constexpr (kNeedsSetup) {
      __shared__ double numbers[Launch::kNumbers];
      __shared__ alignas(Setup<Launch>) unsigned char setup[sizeof(Setup<Launch>)];
      const uint32_t i = threadIdx.x;
      // Before the first loads of elements, for which storing the numbers would have to wait.
      if (i < Launch::kNumbers) numbers[i] = read_number(launch, row, i);
      return [&launch, row] {
        __syncthreads();
        if (threadIdx.x == 0) new (setup) Setup<Launch>(launch, row, numbers);
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
  // Not by <<<>>>, which would copy the arguments, and leave the error among those of others.
  void* arguments[] = {const_cast<Launch*>(&launch)};
  const auto kernel = launch.needs_setup ? &sweep<Launch, true> : &sweep<Launch, false>;
  return cudaLaunchKernel(kernel, num_blocks, kThreads, arguments, 0, stream);
}

}  // namespace emopt::cuda

#define EMOPT_INSTANTIATE_AS(Rule, Epilogue, Real, kBytes) \
  template cudaError_t emopt::cuda::enqueue(               \
      const Launch<emopt::Rule, emopt::Epilogue, Real, kBytes>&, uint32_t, cudaStream_t);
#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)              \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, float, kSmallLaunch) \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, float, kLargeLaunch) \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, double, kSmallLaunch)
#define EMOPT_INSTANTIATE_KERNELS(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
#endif
