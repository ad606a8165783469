// The CUDA calls that the driver makes, implemented on the host: the driver then compiles as C++
// and runs without a GPU. Work runs when it is submitted; during a graph capture it is recorded.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "run_on_host.h"

namespace host_device {

using Work = std::function<void()>;
using Clock = std::chrono::steady_clock;

struct Graph {
  std::vector<Work> work;
};

inline Graph* captured = nullptr;

template <class Function>
void submit(Function work) {
  if (captured != nullptr) {
    captured->work.emplace_back(work);
  } else {
    work();
  }
}

}  // namespace host_device

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
using cudaStream_t = void*;
using cudaEvent_t = host_device::Clock::time_point*;
using cudaGraph_t = host_device::Graph*;
using cudaGraphExec_t = host_device::Graph*;

struct cudaDeviceProp {
  char name[256] = "none: a simulation, whose times mean nothing";
  int major = 0;
  int minor = 0;
  int multiProcessorCount = 2;
  int l2CacheSize = 1 << 14;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 26;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  host_device::submit([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new host_device::Clock::time_point();
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = host_device::Clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(*end - *start).count();
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  host_device::captured = new host_device::Graph();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = host_device::captured;
  host_device::captured = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long) {
  *exec = new host_device::Graph(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const host_device::Work& work : exec->work) work();
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

namespace emopt::cuda {

template <class Launch>
cudaError_t enqueue(const Launch& launch, uint32_t num_blocks, cudaStream_t) {
  // A fault that the driver must find.
  static const bool drops_last_block = std::getenv("EMOPT_DROP_LAST_BLOCK") != nullptr;
  if (drops_last_block) --num_blocks;
  host_device::submit([=] { run_on_host(launch, num_blocks); });
  return cudaSuccess;
}

inline cudaError_t enqueue(const Advance& counters, cudaStream_t) {
  host_device::submit([=] { advance_counters(counters, 0, 1); });
  return cudaSuccess;
}

}  // namespace emopt::cuda
