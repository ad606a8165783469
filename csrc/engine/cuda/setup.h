// What a block computes once, from scalars on the host or on the device, before it sweeps.
#pragma once

#include <cstdint>

#include "../codes.h"
#include "../epilogue.h"
#include "../stochastic.h"
#include "launch.h"

namespace emopt::cuda {

// The rule with a row's scalar states.
template <class Launch>
EMOPT_FN typename Launch::Rule rule_at(const Launch& launch, uint32_t row,
                                       const double (&scalars)[Launch::kScalars]) {
  typename Launch::Rule rule = launch.rule;
  for (int i = 0; i < kNumScalarStates<typename Launch::Rule>; ++i) {
    if (launch.steps[row].scalars[i] == nullptr) continue;
    scalars_of(rule)[i] = scalars[static_cast<int>(Launch::kFirstState) + i];
  }
  return rule;
}

// The keys of the random bits of codes: by code_seed().
template <class Launch, bool kHasCodes = Launch::kHasCodes>
struct CodeKeys {
  uint64_t code_keys[(kNumStates<typename Launch::Rule> + 1) / 2];
};
template <class Launch>
struct CodeKeys<Launch, false> {};

// The data that the threads of a block share.
template <class Launch>
struct Setup : CodeKeys<Launch> {
  Constants<typename Launch::Rule, typename Launch::Epilogue, typename Launch::Real> constants;
  bool is_skipped = false;
  bool is_stochastic = false;
  uint64_t key = 0;

  // For launches whose scalars are all on the host.
  EMOPT_FN explicit Setup(const Launch& launch) : constants(launch.constants) {}

  // For launches with scalars in device memory, step counters, stochastic rounding or codes. `rule`
  // is the launch's, with the row's scalar states.
  EMOPT_FN Setup(const Launch& launch, const typename Launch::Rule& rule, uint32_t row,
                 const double (&scalars)[Launch::kScalars])
      : constants(rule, scalars[0], launch.epilogue.with_scalars(scalars + 1)),
        is_skipped(launch.epilogue.with_scalars(scalars + 1).is_skipped()) {
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      const auto count = static_cast<uint64_t>(static_cast<int64_t>(scalars[0]));
      key = rounding_key(launch.epilogue.seed, launch.steps[row].position, count);
      is_stochastic =
          launch.epilogue.is_stochastic && can_round_stochastically(launch.dtype[kUpdate]);
      if constexpr (Launch::kHasCodes) {
        uint64_t seed = 0;
        for (uint64_t& each : this->code_keys) {
          each = rounding_key(seed++, launch.codes[row].place.position, count);
        }
      }
    }
  }
};

// The i-th scalar of a setup: the step, then the epilogue's. Each thread of a block reads one. Its
// address is selected before it is read, so that one instruction loads all scalars of a type;
// branches would serialize the loads.
template <class Launch>
EMOPT_FN double read_scalar(const Launch& launch, uint32_t row, uint32_t i) {
  HostOrDeviceScalar scalar = i == 0 ? launch.step : launch.epilogue.scalar(i - 1);
  bool is_counter = false;
  if constexpr (Launch::Epilogue::kHasRowSteps) {
    is_counter = i == 0 && launch.steps[row].counter != nullptr;
    if (is_counter) scalar = {0.0, launch.steps[row].counter};
  }
  if constexpr (Launch::kScalars != Launch::kFirstState) {
    if (i >= Launch::kFirstState) {
      scalar = {0.0, launch.steps[row].scalars[i - Launch::kFirstState]};
    }
  }
  const double value = scalar.read();
  return is_counter ? static_cast<double>(static_cast<float>(value) + 1.0f) : value;
}

}  // namespace emopt::cuda
