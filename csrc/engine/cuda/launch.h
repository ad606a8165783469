// A kernel's arguments, one struct passed by value. Nothing is copied to the device beforehand and
// nothing must outlive the launch, so a captured launch can be replayed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../operands.h"
#include "../rule_traits.h"
#include "tuning.h"

namespace emopt::cuda {

// A rule and an epilogue at one step, in one arithmetic type.
template <class Rule, class Epilogue, class Real>
struct Constants {
  typename Rule::template Step<Real> step;
  typename Epilogue::template At<Real> epilogue;

  EMOPT_FN Constants(const Rule& rule, double step_, const Epilogue& epilogue_)
      : step(rule, step_), epilogue(epilogue_) {
    if (keeps_weight(step)) epilogue.hold();
  }
};

// The scalar states of a rule for which a launch has room.
template <class Rule>
inline constexpr uint32_t kScalarSlots = static_cast<uint32_t>(kNumScalarStates<Rule>);

template <class Rule_, class Epilogue_, class Real_, bool kHasCodes_>
struct LaunchHead {
  using Rule = Rule_;
  using Epilogue = Epilogue_;
  using Real = Real_;
  static constexpr bool kHasCodes = kHasCodes_;  // whether states may be stored as codes
  static constexpr int kOperands = kNumOperands<kNumStates<Rule>, Epilogue>;
  // Split masters need float32 arithmetic: no float64 gradients or states.
  static constexpr bool kMayBeSplit = Epilogue::kOperands > 0 && sizeof(Real) == sizeof(float);
  // The step, the epilogue's, and the rule's scalar states.
  static constexpr uint32_t kFirstState = 1 + Epilogue::kScalars;
  static constexpr uint32_t kScalars = kFirstState + kScalarSlots<Rule>;

  // Blocks that a multiprocessor holds at once.
  static constexpr uint32_t num_blocks(bool needs_setup) {
    const int blocks = kBlocks - needs_setup - (kOperands > 5);
    const int fitting = sizeof(Real) == sizeof(float) ? blocks : blocks / 2;
    return static_cast<uint32_t>(fitting > 1 ? fitting : 1);
  }

  Rule rule;
  Epilogue epilogue;
  HostOrDeviceScalar step;
  Constants<Rule, Epilogue, Real> constants;  // unused if needs_setup
  bool needs_setup = false;                   // whether blocks compute the constants, or a key
  uint32_t num_rows = 0;
  uint32_t chunk = kMaxChunk;  // elements that a block sweeps, a multiple of kTile
  DType dtype[kOperands];      // of all rows

  LaunchHead(const Rule& rule_, const HostOrDeviceScalar& step_, const Epilogue& epilogue_,
             const DType (&dtype_)[kOperands])
      : rule(rule_),
        epilogue(epilogue_),
        step(step_),
        constants(rule_, step_.is_on_device() ? 1.0 : step_.value,
                  epilogue_.is_on_device() ? Epilogue{} : epilogue_) {
    for (int k = 0; k < kOperands; ++k) dtype[k] = dtype_[k];
  }
};

// A row's step and random bits, for epilogues with kHasRowSteps.
struct RowStep {
  float* counter;  // null if the launch's step applies
  uint64_t position, first_index;
};

// The same, and the scalar states, for rules that have some. Null: the launch's rule has the value.
template <uint32_t kSlots>
struct RowStepAndScalars : RowStep {
  float* scalars[kSlots];
};
template <>
struct RowStepAndScalars<0> : RowStep {};

// A row's scales, null where a state is not stored as codes, and what their random bits depend on.
template <int kStates, bool kHasCodes>
struct RowCodes {
  uint8_t* scales[kStates];
  StatePlace place;
};
template <int kStates>
struct RowCodes<kStates, false> {};

// Up to `kCapacity` rows of the same dtypes on one device, in at most `kBytes` bytes. A row is cut
// into chunks, counted from its first element; each block sweeps one.
template <class Rule_, class Epilogue_, class Real_, size_t kBytes_, bool kHasCodes_ = false>
struct Launch : LaunchHead<Rule_, Epilogue_, Real_, kHasCodes_> {
  using Head = LaunchHead<Rule_, Epilogue_, Real_, kHasCodes_>;
  using Head::kOperands;
  using typename Head::Epilogue;
  using typename Head::Real;
  static constexpr size_t kBytes = kBytes_;

  using RowCodesOf = RowCodes<kNumStates<Rule_>, kHasCodes_>;
  using RowStepOf = RowStepAndScalars<kScalarSlots<Rule_>>;
  static constexpr bool kHasSteps = Epilogue::kHasRowSteps || kScalarSlots<Rule_> != 0;
  static constexpr size_t kRowBytes = kOperands * sizeof(void*) + sizeof(int64_t) + sizeof(Real) +
                                      sizeof(uint32_t) + 1 + (kHasSteps ? sizeof(RowStepOf) : 0) +
                                      (kHasCodes_ ? sizeof(RowCodesOf) : 0);
  static constexpr uint32_t kCapacity = static_cast<uint32_t>(
      (kBytes - sizeof(Head) - sizeof(RowStepOf) - 4 * alignof(void*)) / kRowBytes);

  void* data[kOperands][kCapacity];
  int64_t numel[kCapacity];
  RowStepOf steps[kHasSteps ? kCapacity : 1];
  RowCodesOf codes[kHasCodes_ ? kCapacity : 1];
  Real scale[kCapacity];
  uint32_t first_block[kCapacity];
  uint8_t peel[kCapacity];  // see peel_of()

  using Head::Head;

  // The row of a block: the last one whose first block is at or before it.
  EMOPT_FN uint32_t row_of(uint32_t block) const {
    uint32_t low = 0, high = this->num_rows;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// Counters on a device that are advanced by 1 unless `found_inf` is nonzero.
struct Advance {
  static constexpr uint32_t kCapacity = static_cast<uint32_t>(
      (kSmallLaunch - sizeof(HostOrDeviceScalar) - sizeof(void*)) / sizeof(float*));

  HostOrDeviceScalar found_inf;
  uint32_t count;
  float* counters[kCapacity];
};

// Rows of a rule's that are advanced (EnqueueAdvance).
template <class Rule>
struct AdvanceScalars {
  static constexpr uint32_t kCapacity = static_cast<uint32_t>(
      (kSmallLaunch - sizeof(Rule) - 2 * sizeof(HostOrDeviceScalar) - sizeof(void*)) /
      sizeof(RowScalars));

  Rule rule;
  HostOrDeviceScalar step, found_inf;
  uint32_t count;
  RowScalars rows[kCapacity];
};

// The bytes of a vector access to elements of `size` bytes.
EMOPT_FN constexpr uint32_t vector_bytes(uint32_t size) {
  return kHeld * size < 16 ? kHeld * size : 16;
}

// The number of leading elements, fewer than kHeld, after which all operands are aligned for vector
// accesses; kNoPhase if there is no such number.
inline constexpr uint8_t kNoPhase = 255;

}  // namespace emopt::cuda
