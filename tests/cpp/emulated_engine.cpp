// The CUDA engine on the host: the launches that the real one would make, each block's threads run
// one after the other. Takes the place of engine/cuda/device_sweep.cpp and the CUDA units.
#include "engine/cuda/device_sweep.h"
#include "engine/cuda/plan.h"
#include "run_on_host.h"

namespace emopt::cuda {

template <class Rule, class Epilogue>
void sweep(const Rule& rule, const Number& step, const Epilogue& epilogue,
           const Table<kNumOperands<Rule, Epilogue>>& table) {
  for_each_launch(
      rule, step, epilogue, table, [](int8_t) { return Chip{2, true}; },
      [](int8_t, const auto& launch, uint32_t num_blocks) { run_on_host(launch, num_blocks); });
  if constexpr (Epilogue::kHasRowSteps) {
    for_each_advance(table, epilogue.found_inf,
                     [](int8_t, const Advance& counters) { advance_counters(counters, 0, 1); });
  }
}

std::vector<int> compiled_architectures() { return {900}; }

#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)                     \
  template void sweep(const Rule&, const Number&, const Epilogue&, \
                      const Table<kNumOperands<Rule, Epilogue>>&);
#define EMOPT_INSTANTIATE(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_WITH

}  // namespace emopt::cuda
