// The function through which RuleInfo reaches a rule's kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../host_or_device_scalar.h"

namespace emopt {
struct RuleInstance;
}

namespace emopt::cuda {

// The device properties that a plan depends on.
struct Chip {
  uint32_t multiprocessors;
  bool takes_large_launches;  // the driver allows more than 4096 bytes of arguments
};

// An EnqueueRows, of rows whose states may be stored as codes (`kHasCodes`) or not. Compiled by
// nvcc in the rule's unit.
template <class Rule, class Epilogue, class Real, bool kHasCodes = false>
int enqueue_rows(const RuleInstance& rule, const HostOrDeviceScalar& step, const void* epilogue,
                 const void* const* rows, size_t num_rows, const Chip& chip, void* stream);

}  // namespace emopt::cuda
