#include "erased_enqueue.h"

#include "../epilogue.h"
#include "../program.h"
#include "erased_rule.h"
#include "kernel_table.h"
#include "plan.h"

namespace emopt::cuda {

namespace {

template <int kStates, class Epilogue, class Real>
int enqueue(const RuleInstance& rule, const HostOrDeviceScalar& step, const void* epilogue,
            const void* const* rows, size_t num_rows, const Chip& chip, void* stream) {
  using RowOf = Row<kNumOperands<kStates, Epilogue>>;
  const KernelTable& kernels = *rule.info->program->kernels;
  const int8_t device = static_cast<const RowOf*>(rows[0])->device;
  KernelKey key{Epilogue::kIndex, kPrecision<Real>, false, false};
  Chip usable = chip;
  usable.takes_large_launches &= kernels.has_large(device, key);
  int error = 0;
  const auto enqueue_launch = [&](const auto& launch, uint32_t num_blocks) {
    key.is_large = sizeof(launch) > kSmallLaunch;
    key.needs_setup = launch.needs_setup;
    error = launch_kernel(kernels.find(device, key), &launch, num_blocks, stream);
    return error == 0;
  };
  plan_rows<ErasedRule<kStates>, Epilogue, Real>(ErasedRule<kStates>(rule), step,
                                                 *static_cast<const Epilogue*>(epilogue), rows,
                                                 num_rows, usable, enqueue_launch);
  return error;
}

}  // namespace

EnqueueRows erased_enqueue(uint32_t num_states, int epilogue, int precision) {
  return with_num_states(num_states, [&](auto states) -> EnqueueRows {
    static constexpr EnqueueRows kFunctions[kNumEpilogues][kNumPrecisions] = {
        {&enqueue<states, StoreUpdate, float>, &enqueue<states, StoreUpdate, double>},
        {&enqueue<states, ApplyUpdate, float>, &enqueue<states, ApplyUpdate, double>}};
    return kFunctions[epilogue][precision];
  });
}

}  // namespace emopt::cuda
