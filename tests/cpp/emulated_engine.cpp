// The CUDA engine on the host, in place of engine/cuda/device_sweep.cpp and the CUDA units.
#include "engine/cuda/device_sweep.h"
#include "run_on_host.h"

namespace emopt::cuda {

template <class Rule, class Epilogue>
void sweep(const Rule& rule, const Number& step, const Epilogue& epilogue,
           const Table<kNumOperands<Rule, Epilogue>>& table) {
  sweep_on_host(rule, step, epilogue, table, {2, true},
                [](const auto&... launch) { run_on_host(launch...); });
}

std::vector<int> compiled_architectures() { return {900}; }

#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)                     \
  template void sweep(const Rule&, const Number&, const Epilogue&, \
                      const Table<kNumOperands<Rule, Epilogue>>&);
#define EMOPT_INSTANTIATE(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)

}  // namespace emopt::cuda
