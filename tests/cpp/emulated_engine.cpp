// The CUDA engine on the host: the launches that the real one would make, each block's threads run
// one pair after the other. Takes the place of engine/cuda/device_sweep.cpp and kernels.cu.
#include "engine/cuda/device_sweep.h"
#include "engine/cuda/plan.h"
#include "run_on_host.h"

namespace emopt::cuda {

template <class Rule>
void sweep(const Rule& rule, const StepSource& step, const Table<kNumOperands<Rule>>& table) {
  for_each_launch(rule, step, table, true, [](int8_t, const auto& launch, uint32_t num_blocks) {
    run_on_host(launch, num_blocks);
  });
}

std::vector<int> compiled_architectures() { return {900}; }

#define EMOPT_INSTANTIATE(Rule) \
  template void sweep<Rule>(const Rule&, const StepSource&, const Table<kNumOperands<Rule>>&);
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE

}  // namespace emopt::cuda
