// The kernels that add up gradients.
#include <type_traits>

#include "norm_kernels.h"
#include "norm_work.h"

namespace emopt::cuda {

namespace {

constexpr uint32_t kWarps = kThreads / kWarp;

// Adds the upper half of the lanes to the lower half until one is left, the first thread's.
template <class Norm>
__device__ double add_lanes_of_warp(Norm norm, double sum) {
  EMOPT_UNROLL
  for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
    sum = norm.add(sum, __shfl_down_sync(0xffffffff, sum, half));
  }
  return sum;
}

template <class Launch>
__global__ void __launch_bounds__(kThreads, kNormBlocks)
    sum_blocks(const __grid_constant__ Launch launch) {
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  if (block >= launch.num_blocks) return;
  const double sum = with_norm(launch.order, [&](auto norm) {
    return add_lanes_of_warp(norm, sum_in_block(norm, launch, block, lane));
  });
  if (lane == 0) launch.block_sums[block] = sum;
}

template <class Launch>
__global__ void __launch_bounds__(kThreads, kNormBlocks)
    sum_tensors(const __grid_constant__ Launch launch) {
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  if (row >= launch.num_rows) return;
  const double sum = with_norm(launch.order, [&](auto norm) {
    return sum_of_tensor(norm, launch, row, [&](auto sum_of_lane) {
      return add_lanes_of_warp(norm, sum_of_lane(lane));
    });
  });
  if (lane == 0) launch.tensor_sums[launch.position[row]] = sum;
}

// One thread adds them in order; all load them.
__global__ void __launch_bounds__(kThreads) add_tensors(const __grid_constant__ AddTensors all) {
  __shared__ double sums[kTile];
  double sum = 0.0;
  for (int64_t begin = 0; begin < all.num_tensors; begin += kTile) {
    const int64_t remaining = all.num_tensors - begin;
    const uint32_t n = static_cast<uint32_t>(remaining < kTile ? remaining : kTile);
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) sums[i] = all.tensor_sums[begin + i];
    __syncthreads();
    if (threadIdx.x == 0) sum = add_in_order(all.order, sum, sums, n);
    __syncthreads();
  }
  if (threadIdx.x == 0) *all.sum = with_one_nan(sum);
}

template <class Kernel, class Arguments>
cudaError_t launch_kernel(Kernel kernel, uint32_t num_blocks, const Arguments& arguments,
                          cudaStream_t stream) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernel(kernel, num_blocks, kThreads, pointers, 0, stream);
}

template <class Launch>
cudaError_t enqueue_both(const Launch& launch, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<Launch> && sizeof(Launch) <= Launch::kBytes);
  const auto blocks_for = [](uint32_t warps) { return warps / kWarps + (warps % kWarps != 0); };
  const cudaError_t error =
      launch_kernel(&sum_blocks<Launch>, blocks_for(launch.num_blocks), launch, stream);
  if (error != cudaSuccess) return error;
  return launch_kernel(&sum_tensors<Launch>, blocks_for(launch.num_rows), launch, stream);
}

}  // namespace

cudaError_t enqueue(const SmallNormLaunch& launch, cudaStream_t stream) {
  return enqueue_both(launch, stream);
}
cudaError_t enqueue(const LargeNormLaunch& launch, cudaStream_t stream) {
  return enqueue_both(launch, stream);
}

cudaError_t enqueue(const AddTensors& arguments, cudaStream_t stream) {
  return launch_kernel(&add_tensors, 1, arguments, stream);
}

}  // namespace emopt::cuda
