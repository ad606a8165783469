// Kernels that are compiled at run time, instead of engine/cuda/loaded_kernels.cpp. Their machine
// code is a shared library (tests/emulated_kernels.py), whose file the code names.
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include "engine/cuda/erased_enqueue.h"

namespace emopt::cuda {

void* load_kernel(const std::string& code, const char* name) {
  void* const library = dlopen(code.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "cannot load the kernel ", name, ": ", dlerror());
  void* const kernel = dlsym(library, name);
  TORCH_CHECK(kernel != nullptr, "cannot load the kernel ", name, ": ", dlerror());
  return kernel;
}

int launch_kernel(void* kernel, const void* argument, uint32_t num_blocks, void* /*stream*/) {
  reinterpret_cast<void (*)(const void*, uint32_t)>(kernel)(argument, num_blocks);
  return 0;
}

}  // namespace emopt::cuda
