// The kernel that sweeps a rule over the rows of a launch, for nvcc and NVRTC.
#pragma once

#include <new>

#include "chunk.h"

namespace emopt::cuda {

// Makes the ranks of a thread's elements those of their groups.
template <class Launch>
__device__ __forceinline__ void share_ranks(const Launch& launch,
                                            int32_t (&ranks)[Launch::kOperands]) {
  constexpr uint32_t kInGroup = (1u << kGroupThreads) - 1u;
  const uint32_t group = kInGroup << (threadIdx.x % 32 / kGroupThreads * kGroupThreads);
  __syncwarp(group);  // all have loaded the scales, which one of them will store
  EMOPT_UNROLL
  for (int k = kFirstState; k < Launch::kOperands; ++k) {
    with_code_of<Launch>(k, launch.dtype[k], [&](auto) {
      EMOPT_UNROLL
      for (uint32_t distance = 1; distance < kGroupThreads; distance *= 2) {
        const int32_t other = __shfl_xor_sync(group, ranks[k], distance);
        if (other > ranks[k]) ranks[k] = other;
      }
    });
  }
}

// Two kernels. If the host knows all scalars, instructions read the constants from the kernel's
// arguments, which takes no registers. Otherwise each block reads the scalars and computes the
// constants.
template <class Launch, bool kNeedsSetup>
__device__ __forceinline__ void sweep_block(const Launch& launch) {
  const auto share = [&](auto& ranks) { share_ranks(launch, ranks); };
  const auto prepare = [&](uint32_t row) {
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
  };
  sweep_chunk(launch, blockIdx.x, threadIdx.x, prepare, share);
}

template <class Launch, bool kNeedsSetup>
__global__ void __launch_bounds__(kThreads, Launch::num_blocks(kNeedsSetup))
    sweep(const __grid_constant__ Launch launch) {
  sweep_block<Launch, kNeedsSetup>(launch);
}

}  // namespace emopt::cuda
