// The launches of kernels that are compiled at run time. Independent of CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../rule_info.h"

namespace emopt::cuda {

// The function for RuleInfo::enqueue of a rule that has a table of such kernels (program.h).
EnqueueRows erased_enqueue(uint32_t num_states, bool has_scalars, int epilogue, int precision);

// The same for RuleInfo::enqueue_codes. Null if there are no states.
EnqueueRows erased_enqueue_codes(uint32_t num_states, bool has_scalars);

// An EnqueueAdvance for such a rule.
int erased_enqueue_advance(const RuleInstance& rule, const HostOrDeviceScalar& step,
                           const HostOrDeviceScalar& found_inf, const RowScalars* rows,
                           size_t num_rows, int8_t device, void* stream);

// Makes a kernel of machine code for the current device. Raises if that fails. Never unloaded.
void* load_kernel(const std::string& code, const char* name);

// Launches a kernel whose only argument is at `argument`. Returns a cudaError_t.
int launch_kernel(void* kernel, const void* argument, uint32_t num_blocks, void* stream);

}  // namespace emopt::cuda
