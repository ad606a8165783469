// A rule's kernels on the host, instead of engine/cuda/kernel.h.
#pragma once

#include "engine/cuda/plan.h"
#include "engine/rule_info.h"
#include "run_on_host.h"

namespace emopt::cuda {

template <class Rule, class Epilogue, class Real, bool kHasCodes>
int enqueue_rows(const RuleInstance& rule, const HostOrDeviceScalar& step, const void* epilogue,
                 const void* const* rows, size_t num_rows, const Chip& chip, void* /*stream*/) {
  const auto run = [](const auto& launch, uint32_t num_blocks) {
    run_on_host(launch, num_blocks);
    return true;
  };
  if constexpr (!kHasCodes || kMayHaveCodes<Rule>) {
    plan_rows<Rule, Epilogue, Real, kHasCodes>(*reinterpret_cast<const Rule*>(rule.bytes), step,
                                               *static_cast<const Epilogue*>(epilogue), rows,
                                               num_rows, chip, run);
  }
  return 0;
}

}  // namespace emopt::cuda
