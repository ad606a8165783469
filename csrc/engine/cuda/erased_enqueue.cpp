#include "erased_enqueue.h"

#include "../epilogue.h"
#include "../program.h"
#include "erased_rule.h"
#include "kernel_table.h"
#include "plan.h"

namespace emopt::cuda {

namespace {

template <int kStates, uint32_t kSlots, class Epilogue, class Real, bool kHasCodes = false>
int enqueue(const RuleInstance& rule, const HostOrDeviceScalar& step, const void* epilogue,
            const void* const* rows, size_t num_rows, const Chip& chip, void* stream) {
  using RowOf = Row<kNumOperands<kStates, Epilogue>>;
  const KernelTable& kernels = *rule.info->program->kernels;
  const int8_t device = static_cast<const RowOf*>(rows[0])->device;
  KernelKey key{Epilogue::kIndex, kPrecision<Real>, false, kHasCodes, kHasCodes};
  Chip usable = chip;
  usable.takes_large_launches &= kernels.has_large(device, key);
  int error = 0;
  const auto enqueue_launch = [&](const auto& launch, uint32_t num_blocks) {
    key.is_large = sizeof(launch) > kSmallLaunch;
    key.needs_setup = launch.needs_setup;
    error = launch_kernel(kernels.find(device, key), &launch, num_blocks, stream);
    return error == 0;
  };
  using Erased = ErasedRule<kStates, kSlots>;
  plan_rows<Erased, Epilogue, Real, kHasCodes>(Erased(rule), step,
                                               *static_cast<const Epilogue*>(epilogue), rows,
                                               num_rows, usable, enqueue_launch);
  return error;
}

template <uint32_t kSlots>
EnqueueRows enqueue_of(uint32_t num_states, int epilogue, int precision) {
  return with_num_states(num_states, [&](auto states) -> EnqueueRows {
    static constexpr EnqueueRows kFunctions[kNumEpilogues][kNumPrecisions] = {
        {&enqueue<states, kSlots, StoreUpdate, float>,
         &enqueue<states, kSlots, StoreUpdate, double>},
        {&enqueue<states, kSlots, ApplyUpdate, float>,
         &enqueue<states, kSlots, ApplyUpdate, double>}};
    return kFunctions[epilogue][precision];
  });
}

template <uint32_t kSlots>
EnqueueRows enqueue_codes_of(uint32_t num_states) {
  return with_num_states(num_states, [](auto states) -> EnqueueRows {
    if constexpr (states == 0) {
      return nullptr;
    } else {
      return &enqueue<states, kSlots, ApplyUpdate, float, true>;
    }
  });
}

}  // namespace

EnqueueRows erased_enqueue(uint32_t num_states, bool has_scalars, int epilogue, int precision) {
  return has_scalars ? enqueue_of<kMaxScalarStates>(num_states, epilogue, precision)
                     : enqueue_of<0>(num_states, epilogue, precision);
}

EnqueueRows erased_enqueue_codes(uint32_t num_states, bool has_scalars) {
  return has_scalars ? enqueue_codes_of<kMaxScalarStates>(num_states)
                     : enqueue_codes_of<0>(num_states);
}

int erased_enqueue_advance(const RuleInstance& rule, const HostOrDeviceScalar& step,
                           const HostOrDeviceScalar& found_inf, const RowScalars* rows,
                           size_t num_rows, int8_t device, void* stream) {
  void* const kernel = rule.info->program->kernels->find(device, KernelKey::advance());
  int error = 0;
  const auto enqueue_launch = [&](const auto& launch) {
    error = launch_kernel(kernel, &launch, 1, stream);
    return error == 0;
  };
  plan_advance(ErasedRule<0, kMaxScalarStates>(rule), step, found_inf, rows, num_rows,
               enqueue_launch);
  return error;
}

}  // namespace emopt::cuda
