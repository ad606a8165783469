// The kernel, and its instances. Sees no torch.
#include <new>
#include <type_traits>

#include "chunk.h"
#include "kernels.h"

namespace emopt::cuda {

namespace {

// Blocks that a multiprocessor is to hold at a time, which bounds the registers of a thread: three
// to 80 (85 would do), two to 128, one to 255. Where an update is applied, a thread holds the
// weight as well, and has as much more in flight.
template <class Launch>
constexpr int kMinBlocks = sizeof(typename Launch::Real) == 4
                               ? 3 - Launch::Epilogue::kOperands
                               : (Launch::kOperands + Launch::Epilogue::kOperands < 5 ? 2 : 1);

template <class Launch>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Launch>)
    sweep(const __grid_constant__ Launch launch) {
  const uint32_t row = launch.row_of(blockIdx.x);
  Setup<Launch> setup(launch);
  if (launch.needs_setup) {
    __shared__ alignas(Setup<Launch>) unsigned char shared[sizeof(Setup<Launch>)];
    if (threadIdx.x == 0) new (shared) Setup<Launch>(launch, row);
    __syncthreads();
    setup = *reinterpret_cast<const Setup<Launch>*>(shared);
    if (setup.is_skipped) return;
  }
  sweep_chunk<1>(launch, setup, row, blockIdx.x, threadIdx.x);
}

__global__ void __launch_bounds__(kThreads) advance(const __grid_constant__ Advance counters) {
  advance_counters(counters, threadIdx.x, kThreads);
}

}  // namespace

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Launch> && sizeof(Launch) <= Launch::kBytes);
  // Not by <<<>>>, which would copy the arguments, and leave the error among those of others.
  void* arguments[] = {const_cast<Launch*>(&launch)};
  return cudaLaunchKernel(&sweep<Launch>, num_blocks, kThreads, arguments, 0, stream);
}

cudaError_t enqueue(const Advance& counters, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Advance> && sizeof(Advance) <= kSmallLaunch);
  void* arguments[] = {const_cast<Advance*>(&counters)};
  return cudaLaunchKernel(&advance, 1, kThreads, arguments, 0, stream);
}

std::vector<int> compiled_architectures() { return {__CUDA_ARCH_LIST__}; }

#define EMOPT_INSTANTIATE_AS(Rule, Epilogue, Real, kBytes) \
  template cudaError_t enqueue(const Launch<Rule, Epilogue, Real, kBytes>&, uint32_t, cudaStream_t);
#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)              \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, float, kSmallLaunch) \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, float, kLargeLaunch) \
  EMOPT_INSTANTIATE_AS(Rule, Epilogue, double, kSmallLaunch)
#define EMOPT_INSTANTIATE(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_WITH
#undef EMOPT_INSTANTIATE_AS

}  // namespace emopt::cuda
