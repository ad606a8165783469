// A rule's unit for emulated devices, instead of engine/rule_unit.h: one kernel of the rule, with
// the options of engine/cuda/one_kernel/engine/rule_unit.h, which runs on the host.
#pragma once

#include <cstdlib>

#include "engine/cuda/padded_rule.h"
#include "run_on_host.h"

#if defined(EMOPT_ADVANCE)
#define EMOPT_RULE(Rule)                                                    \
  namespace emopt::cuda {                                                   \
  using KernelLaunch = AdvanceScalars<PaddedRule<Rule>>;                    \
  }                                                                         \
  extern "C" void EMOPT_KERNEL(const void* argument, uint32_t num_blocks) { \
    if (num_blocks != 1) std::abort();                                      \
    run_on_host(*static_cast<const emopt::cuda::KernelLaunch*>(argument));  \
  }
#else
#define EMOPT_RULE(Rule)                                                                   \
  namespace emopt::cuda {                                                                  \
  using KernelLaunch =                                                                     \
      Launch<PaddedRule<Rule>, EMOPT_EPILOGUE, EMOPT_REAL, EMOPT_LAUNCH, EMOPT_HAS_CODES>; \
  }                                                                                        \
  extern "C" void EMOPT_KERNEL(const void* argument, uint32_t num_blocks) {                \
    const auto& launch = *static_cast<const emopt::cuda::KernelLaunch*>(argument);         \
    if (launch.needs_setup != EMOPT_NEEDS_SETUP) std::abort();                             \
    run_on_host(launch, num_blocks);                                                       \
  }
#endif
