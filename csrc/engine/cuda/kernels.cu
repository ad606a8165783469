// The kernel, and its instances. Sees no torch.
#include <new>
#include <type_traits>

#include "chunk.h"
#include "kernels.h"

namespace emopt::cuda {

namespace {

// Blocks that a multiprocessor is to hold at a time, which bounds the registers of a thread: to 80
// for float32 (85 would do), to 128 for float64 and to 255 where that has five operands, since
// those would not fit in 128.
template <class Launch>
constexpr int kMinBlocks = sizeof(typename Launch::Real) == 4 ? 3
                           : Launch::kOperands < 5            ? 2
                                                              : 1;

template <class Epilogue, class Launch>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Launch>)
    sweep(const __grid_constant__ Launch launch) {
  using Step = typename Launch::Step;
  Step step = launch.step;
  if (launch.source.is_on_device()) {
    // Schedules and bias corrections from a step that only the device knows, in float64.
    __shared__ alignas(Step) unsigned char shared[sizeof(Step)];
    if (threadIdx.x == 0) new (shared) Step(launch.rule, read_step(launch.source));
    __syncthreads();
    step = *reinterpret_cast<const Step*>(shared);
  }
  sweep_chunk<Epilogue, 1>(launch, step, blockIdx.x, threadIdx.x);
}

}  // namespace

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Launch> && sizeof(Launch) <= Launch::kBytes);
  // Not by <<<>>>, which would copy the arguments, and leave the error among those of others.
  void* arguments[] = {const_cast<Launch*>(&launch)};
  return cudaLaunchKernel(&sweep<StoreUpdate, Launch>, num_blocks, kThreads, arguments, 0, stream);
}

std::vector<int> compiled_architectures() { return {__CUDA_ARCH_LIST__}; }

#define EMOPT_INSTANTIATE_AS(Rule, Real, kBytes) \
  template cudaError_t enqueue(const Launch<Rule, Real, kBytes>&, uint32_t, cudaStream_t);
#define EMOPT_INSTANTIATE(Rule)                    \
  EMOPT_INSTANTIATE_AS(Rule, float, kSmallLaunch)  \
  EMOPT_INSTANTIATE_AS(Rule, double, kSmallLaunch) \
  EMOPT_INSTANTIATE_AS(Rule, float, kLargeLaunch)  \
  EMOPT_INSTANTIATE_AS(Rule, double, kLargeLaunch)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_AS

}  // namespace emopt::cuda
