// The CUDA engine on the host: the launches that the real one would make, each block's threads run
// one pair after the other. Takes the place of engine/cuda/device_sweep.cpp and kernels.cu.
#include "engine/cuda/chunk.h"
#include "engine/cuda/device_sweep.h"
#include "engine/cuda/plan.h"

namespace emopt::cuda {

namespace {

struct RunOnHost {
  template <class Launch>
  void operator()(int8_t, const Launch& launch, uint32_t num_blocks) const {
    typename Launch::Step step = launch.step;
    if (launch.source.is_on_device()) {
      step = typename Launch::Step(launch.rule, read_step(launch.source));
    }
    for (uint32_t block = 0; block < num_blocks; ++block) {
      for (uint32_t thread = 0; thread < kThreads; thread += 2) {
        sweep_chunk<StoreUpdate, 2>(launch, step, block, thread);
      }
    }
  }
};

}  // namespace

template <class Rule>
void sweep(const Rule& rule, const StepSource& step, const Table<kNumOperands<Rule>>& table) {
  for_each_launch(rule, step, table, true, RunOnHost());
}

std::vector<int> compiled_architectures() { return {900}; }

#define EMOPT_INSTANTIATE(Rule) \
  template void sweep<Rule>(const Rule&, const StepSource&, const Table<kNumOperands<Rule>>&);
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE

}  // namespace emopt::cuda
