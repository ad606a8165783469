// The kernel that sweeps a rule over the rows of a launch, for nvcc and NVRTC.
#pragma once

#include <new>

#include "chunk.h"

namespace emopt::cuda {

// Two kernels. If the host knows all scalars, instructions read the constants from the kernel's
// arguments, which takes no registers. Otherwise each block reads the scalars and computes the
// constants.
template <class Launch, bool kNeedsSetup>
__device__ __forceinline__ void sweep_block(const Launch& launch) {
  sweep_chunk(launch, blockIdx.x, threadIdx.x, [&](uint32_t row) {
    if constexpr (kNeedsSetup) {
      __shared__ double scalars[Launch::kScalars];
      __shared__ alignas(Setup<Launch>) unsigned char setup[sizeof(Setup<Launch>)];
      const uint32_t i = threadIdx.x;
      // Do this before the first loads of elements: storing the scalars would wait for them.
      if (i < Launch::kScalars) scalars[i] = read_scalar(launch, row, i);
      return [&launch, row] {
        __syncthreads();
        if (threadIdx.x == 0) {
          // Not in a function of both cases: the compiler then keeps scalars that a rule ignores.
          if constexpr (kNumScalarStates<typename Launch::Rule> == 0) {
            new (setup) Setup<Launch>(launch, launch.rule, row, scalars);
          } else {
            new (setup) Setup<Launch>(launch, rule_at(launch, row, scalars), row, scalars);
          }
        }
        __syncthreads();
        return *reinterpret_cast<const Setup<Launch>*>(setup);
      };
    } else {
      return [&launch] { return Setup<Launch>(launch); };
    }
  });
}

template <class Launch, bool kNeedsSetup>
__global__ void __launch_bounds__(kThreads, Launch::num_blocks(kNeedsSetup))
    sweep(const __grid_constant__ Launch launch) {
  sweep_block<Launch, kNeedsSetup>(launch);
}

}  // namespace emopt::cuda
