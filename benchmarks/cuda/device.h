// The device, its memory and its stream, and the launches of a step as the package plans them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__CUDACC__)
#include "engine/cuda/advance.cu"
#include "engine/cuda/kernel.h"
#else
#include "host_device.h"
#endif
#include "launches.h"
#include "workload.h"

namespace driver {

inline constexpr int kFailed = 2, kWrong = 3;  // exit statuses

#define CALL(call) ::driver::check_call(call, #call, __FILE__, __LINE__)
inline void check_call(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
  std::exit(kFailed);
}

struct Device {
  cudaDeviceProp properties{};
  cuda::Chip chip{};
  cudaStream_t stream{};
  char* memory = nullptr;
  size_t bytes = 0;
  double copy_rate = 1e12;  // bytes per second; an estimate until measured

  // Allocates the memory that the largest case needs, or most of the free memory.
  explicit Device(size_t wanted) {
    int version = 0;
    size_t free = 0, total = 0;
    CALL(cudaGetDeviceProperties(&properties, 0));
    CALL(cudaDriverGetVersion(&version));
    CALL(cudaMemGetInfo(&free, &total));
    CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    chip.multiprocessors = static_cast<uint32_t>(properties.multiProcessorCount);
    chip.takes_large_launches = version >= 12010;
    bytes = std::min(wanted, free / 10 * 9);
    void* data = nullptr;
    CALL(cudaMalloc(&data, bytes));
    memory = static_cast<char*>(data);
  }

  void copy(void* to, const void* from, size_t count, cudaMemcpyKind kind) {
    CALL(cudaMemcpyAsync(to, from, count, kind, stream));
    CALL(cudaStreamSynchronize(stream));
  }
};

#if defined(__CUDACC__)
template <class Work>
__global__ void __launch_bounds__(256) do_each(const Work work, uint64_t count) {
  const uint64_t i = blockIdx.x * uint64_t{256} + threadIdx.x;
  if (i < count) work(i);
}
template <class Work>
cudaError_t for_each(const Work& work, uint64_t count, cudaStream_t stream) {
  do_each<<<static_cast<uint32_t>((count + 255) / 256), 256, 0, stream>>>(work, count);
  return cudaGetLastError();
}
#else
template <class Work>
cudaError_t for_each(const Work& work, uint64_t count, cudaStream_t) {
  host_device::submit([=] {
    for (uint64_t i = 0; i < count; ++i) work(i);
  });
  return cudaSuccess;
}
#endif

// Enqueues a step of the table; returns the number of launches.
template <class Epilogue>
int step_on_device(Device& device, const cuda::Chip& chip, const HostOrDeviceScalar& step,
                   const Epilogue& epilogue, const Table<kNumOperandsOf<Epilogue>>& table) {
  int launches = 0;
  for_each_launch(kRule, step, epilogue, table, chip,
                  [&](int8_t, const auto& launch, auto... num_blocks) {
                    CALL(cuda::enqueue(launch, num_blocks..., device.stream));
                    ++launches;
                  });
  return launches;
}

}  // namespace driver
