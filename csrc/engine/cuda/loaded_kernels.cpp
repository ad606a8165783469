// Loads and launches machine code by the driver's library, which is in the process already.
#include <ATen/DynamicLibrary.h>
#include <c10/util/Exception.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "erased_enqueue.h"
#include "tuning.h"

namespace emopt::cuda {

namespace {

struct Driver {
  // Never closed.
  at::DynamicLibrary& library = *new at::DynamicLibrary("libcuda.so.1");
  decltype(&cuModuleLoadData) load_data = find<decltype(load_data)>("cuModuleLoadData");
  decltype(&cuModuleGetFunction) get_function = find<decltype(get_function)>("cuModuleGetFunction");
  decltype(&cuLaunchKernel) launch = find<decltype(launch)>("cuLaunchKernel");
  decltype(&cuGetErrorString) error_string = find<decltype(error_string)>("cuGetErrorString");

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(CUresult result, const char* name) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(result, &text);
    TORCH_CHECK(false, "the driver cannot load the kernel ", name, ": ",
                text != nullptr ? text : "unknown error");
  }

 private:
  template <class Function>
  Function find(const char* name) {
    return reinterpret_cast<Function>(library.sym(name));
  }
};

// Lets this thread load modules while another one captures a graph.
class AnyCapture {
 public:
  AnyCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AnyCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AnyCapture(const AnyCapture&) = delete;
  AnyCapture& operator=(const AnyCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes the context of the thread's device current, as the runtime does at its first call.
void make_context_current() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaSetDevice(device);
}

}  // namespace

void* load_kernel(const std::string& code, const char* name) {
  const AnyCapture any_capture;
  make_context_current();
  const Driver& driver = Driver::get();
  CUmodule module = nullptr;
  driver.check(driver.load_data(&module, code.data()), name);
  CUfunction function = nullptr;
  driver.check(driver.get_function(&function, module, name), name);
  return function;
}

int launch_kernel(void* kernel, const void* argument, uint32_t num_blocks, void* stream) {
  void* arguments[] = {const_cast<void*>(argument)};
  const auto launch = [&] {
    return Driver::get().launch(static_cast<CUfunction>(kernel), num_blocks, 1, 1, kThreads, 1, 1,
                                0, static_cast<CUstream>(stream), arguments, nullptr);
  };
  CUresult result = launch();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // the thread has not used the device yet
    make_context_current();
    result = launch();
  }
  return result;  // the runtime's errors have the same numbers
}

}  // namespace emopt::cuda
