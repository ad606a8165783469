// All that a launch needs to know, as one struct that rides in the kernel's arguments: nothing is
// copied to the device beforehand and nothing is kept, so a captured launch can be replayed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../operands.h"
#include "tuning.h"

namespace emopt::cuda {

template <class Rule, class Real>
struct LaunchHead {
  static constexpr int kOperands = kNumOperands<Rule>;
  using Step = typename Rule::template Step<Real>;

  Rule rule;
  Step step;  // not to be used where the step is on the device
  StepSource source;
  uint32_t num_rows;
  DType dtype[kOperands];  // of all rows

  LaunchHead(const Rule& rule_, const StepSource& source_, const DType (&dtype_)[kOperands])
      : rule(rule_),
        step(rule_, source_.is_on_device() ? 1.0 : source_.value),
        source(source_),
        num_rows(0) {
    for (int k = 0; k < kOperands; ++k) dtype[k] = dtype_[k];
  }
};

// Up to `kCapacity` rows of the same dtypes on one device, in at most `kBytes` bytes. A row is cut
// into chunks, counted from its first element; each is a block's work.
template <class Rule_, class Real_, size_t kBytes_>
struct Launch : LaunchHead<Rule_, Real_> {
  using Rule = Rule_;
  using Real = Real_;
  using Head = LaunchHead<Rule, Real>;
  using Head::kOperands;
  static constexpr size_t kBytes = kBytes_;

  static constexpr size_t kRowBytes =
      kOperands * sizeof(void*) + sizeof(int64_t) + sizeof(Real) + sizeof(uint32_t) + 1;
  static constexpr uint32_t kCapacity =
      static_cast<uint32_t>((kBytes - sizeof(Head) - 2 * alignof(void*)) / kRowBytes);

  void* data[kOperands][kCapacity];
  int64_t numel[kCapacity];
  Real scale[kCapacity];
  uint32_t first_block[kCapacity];
  uint8_t peel[kCapacity];  // see peel_of()

  using Head::Head;

  // The row that a block works on: the last one whose first block it does not come before.
  EMOPT_FN uint32_t row_of(uint32_t block) const {
    uint32_t low = 0, high = this->num_rows;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The number of elements, less than kHeld, after which each operand is at a multiple of
// kVectorBytes, so that all can be accessed by vectors from there on; kNoPhase where there is none.
inline constexpr uint8_t kNoPhase = 255;

inline uint8_t peel_of(void* const* data, const DType* dtype, int num_operands) {
  for (uint8_t peel = 0; peel < kHeld; ++peel) {
    bool is_aligned = true;
    for (int k = 0; k < num_operands; ++k) {
      const auto address = reinterpret_cast<uintptr_t>(data[k]);
      is_aligned &=
          (address + static_cast<uintptr_t>(peel * size_of(dtype[k]))) % kVectorBytes == 0;
    }
    if (is_aligned) return peel;
  }
  return kNoPhase;
}

// Blocks of a row. A chunk for each, so 2^31 - 1 of them, the most that a launch has, are more
// elements than any memory holds.
inline int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

}  // namespace emopt::cuda
