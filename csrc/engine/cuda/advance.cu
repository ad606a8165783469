// The kernel that advances counters, and the list of compiled architectures. Independent of rules.
#include "chunk.h"
#include "device_sweep.h"
#include "kernel.h"

namespace emopt::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) advance(const __grid_constant__ Advance counters) {
  advance_counters(counters, threadIdx.x, kThreads);
}

}  // namespace

cudaError_t enqueue(const Advance& counters, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Advance> && sizeof(Advance) <= kSmallLaunch);
  void* arguments[] = {const_cast<Advance*>(&counters)};
  return cudaLaunchKernel(&advance, 1, kThreads, arguments, 0, stream);
}

std::vector<int> compiled_architectures() { return {__CUDA_ARCH_LIST__}; }

}  // namespace emopt::cuda
