// The CUDA engine on the host, instead of engine/cuda/device_sweep.cpp and the CUDA units.
#include "engine/cuda/device_norm.h"
#include "engine/cuda/device_sweep.h"
#include "enqueue_on_host.h"
#include "norm_on_host.h"
#include "rules.h"

namespace emopt::cuda {

#define EMOPT_INSTANTIATE_WITH(Rule, ...)                                                      \
  template int enqueue_rows<Rule, __VA_ARGS__>(const RuleInstance&, const HostOrDeviceScalar&, \
                                               const void*, const void* const*, size_t,        \
                                               const Chip&, void*);
#define EMOPT_INSTANTIATE(Rule)                     \
  EMOPT_INSTANTIATE_WITH(Rule, StoreUpdate, float)  \
  EMOPT_INSTANTIATE_WITH(Rule, StoreUpdate, double) \
  EMOPT_INSTANTIATE_WITH(Rule, ApplyUpdate, float)  \
  EMOPT_INSTANTIATE_WITH(Rule, ApplyUpdate, double) \
  EMOPT_INSTANTIATE_WITH(Rule, ApplyUpdate, float, true)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_WITH

template <int kStates, class Epilogue>
void sweep_on_devices(const RuleInstance& rule, const HostOrDeviceScalar& step,
                      const Epilogue& epilogue,
                      const Table<kNumOperands<kStates, Epilogue>>& table) {
  const auto enqueue_key = [&](const auto& row, const void* const* rows, size_t num_rows) {
    const EnqueueRows enqueue = rule.info->enqueue_of<Epilogue>(row);
    enqueue(rule, step, &epilogue, rows, num_rows, {2, true}, nullptr);
  };
  const auto enqueue_advance = [](int8_t, const Advance& advance) { run_on_host(advance); };
  const auto enqueue_scalars = [&](int8_t device, const std::vector<RowScalars>& rows) {
    if constexpr (Epilogue::kHasRowSteps) {
      advance_on_device(rule, step, epilogue.found_inf, rows.data(), rows.size(), device);
    }
  };
  sweep_table(epilogue, table, enqueue_key, enqueue_advance, enqueue_scalars);
}

void advance_on_device(const RuleInstance& rule, const HostOrDeviceScalar& step,
                       const HostOrDeviceScalar& found_inf, const RowScalars* rows, size_t num_rows,
                       int8_t device) {
  rule.info->enqueue_advance(rule, step, found_inf, rows, num_rows, device, nullptr);
}

void sum_tensors(NormOrder order, const GradTable& table, double* block_sums, double* tensor_sums) {
  plan_norm({order, 0, 0, block_sums, tensor_sums}, table, {2, true}, [](const auto& launch) {
    run_on_host(launch);
    return true;
  });
}

void add_tensors(NormOrder order, int8_t /*device*/, const double* tensor_sums, int64_t num_tensors,
                 double* sum) {
  *sum = with_one_nan(add_in_order(order, 0.0, tensor_sums, num_tensors));
}

std::vector<int> compiled_architectures() { return {900}; }

#define EMOPT_INSTANTIATE(kStates, Epilogue)                                              \
  template void sweep_on_devices<kStates>(const RuleInstance&, const HostOrDeviceScalar&, \
                                          const Epilogue&,                                \
                                          const Table<kNumOperands<kStates, Epilogue>>&);
EMOPT_FOR_EACH_SWEEP(EMOPT_INSTANTIATE)

}  // namespace emopt::cuda
