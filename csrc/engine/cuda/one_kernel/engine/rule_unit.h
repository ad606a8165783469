// A rule's unit for one kernel, instead of engine/rule_unit.h: as NVRTC or nvcc compiles it, with
// no code for the host. The macros that name the kernel and choose it are options of the compiler.
#pragma once

#include "engine/cuda/padded_rule.h"
#include "engine/cuda/sweep_kernel.h"

#if defined(EMOPT_ADVANCE)
#define EMOPT_RULE(Rule)                                                       \
  namespace emopt::cuda {                                                      \
  using KernelLaunch = AdvanceScalars<PaddedRule<Rule>>;                       \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(emopt::cuda::kThreads)          \
      EMOPT_KERNEL(const __grid_constant__ emopt::cuda::KernelLaunch launch) { \
    emopt::cuda::advance_scalars(launch, threadIdx.x, emopt::cuda::kThreads);  \
  }
#else
#define EMOPT_RULE(Rule)                                                                   \
  namespace emopt::cuda {                                                                  \
  using KernelLaunch =                                                                     \
      Launch<PaddedRule<Rule>, EMOPT_EPILOGUE, EMOPT_REAL, EMOPT_LAUNCH, EMOPT_HAS_CODES>; \
  }                                                                                        \
  extern "C" __global__ void __launch_bounds__(                                            \
      emopt::cuda::kThreads, emopt::cuda::KernelLaunch::num_blocks(EMOPT_NEEDS_SETUP))     \
      EMOPT_KERNEL(const __grid_constant__ emopt::cuda::KernelLaunch launch) {             \
    emopt::cuda::sweep_block<emopt::cuda::KernelLaunch, EMOPT_NEEDS_SETUP>(launch);        \
  }
#endif
