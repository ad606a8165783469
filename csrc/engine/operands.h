// A row: the tensors at one position of an operator's lists.
//
// Its operands are the update (or the parameter that it is applied to), the gradient, the states
// and the epilogue's operands. All have the same length and layout: element i of each is at index
// i.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "epilogue.h"
#include "rule_traits.h"

namespace emopt {

inline constexpr int kUpdate = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;

inline constexpr int kMaxStates = 5;
// APPLY(number of states, epilogue): the instantiations of code that is shared by all rules.
#define EMOPT_FOR_EACH_SWEEP(APPLY) \
  EMOPT_FOR_EACH_NUM_STATES(APPLY, StoreUpdate) EMOPT_FOR_EACH_NUM_STATES(APPLY, ApplyUpdate)
#define EMOPT_FOR_EACH_NUM_STATES(APPLY, Epilogue) \
  APPLY(0, Epilogue)                               \
  APPLY(1, Epilogue) APPLY(2, Epilogue) APPLY(3, Epilogue) APPLY(4, Epilogue) APPLY(5, Epilogue)

template <int kStates, class Epilogue>
inline constexpr int kNumOperands = kFirstState + kStates + Epilogue::kOperands;

constexpr bool is_read(int k) { return k != kUpdate; }

// Whether operand k of a row is written, to `data`. A weight at the parameter's address `update` is
// the parameter, which is written as the first operand.
template <class Epilogue, int kOperands>
EMOPT_FN bool is_written(int k, const void* data, const void* update) {
  return k != kGrad && (k < kOperands - Epilogue::kOperands || data != update);
}

// Whether the result is stored in operand k. An unchanged parameter keeps its bits, and so does its
// master weight; states are always stored.
template <class Epilogue, int kOperands, class EpilogueAt>
EMOPT_FN bool is_stored(int k, const EpilogueAt& epilogue) {
  return epilogue.stores() || (k != kUpdate && k < kOperands - Epilogue::kOperands);
}

inline constexpr int8_t kHost = -1;  // a device index

// What the random bits of states depend on: the parameter's position, plus 2^32 times its shard's
// number; and the elements' indices. The row is a block of a matrix if `width` is not 0: `width`
// elements are consecutive, and the next ones `stride` after them.
struct StatePlace {
  uint64_t position, first_index;
  int64_t width, stride;

  // The index of the row's i-th element.
  EMOPT_FN uint64_t index_of(int64_t i) const {
    if (width != 0) i = i / width * stride + i % width;
    return first_index + static_cast<uint64_t>(i);
  }
};

// What few rows have: the rule's scalar states, on the device of the counter, and the scales of
// states that are stored as codes, on that of the row. Null where there is none. (The pointers are
// on the host.)
struct RowExtras {
  float* scalars[kMaxScalarStates];
  uint8_t* scales[kMaxStates];
  StatePlace place;
};

template <int kOperands>
struct Row {
  void* data[kOperands];
  DType dtype[kOperands];
  DType compute;          // kFloat64 if an operand that is read is float64, else kFloat32
  int8_t device = kHost;  // or a CUDA device's index
  // For the random bits: the parameter's position in the optimizer, plus 2^32 times its shard's
  // number; and the index of the first element.
  uint64_t position = 0;
  uint64_t first_index = 0;
  double scale;           // a factor for the update (Signum's shape scaling), else 1
  float* step = nullptr;  // the counter of finished steps, if it is on the parameter's device
  RowExtras* extras = nullptr;
  int64_t numel;
  int64_t start;  // the number of elements in all earlier rows

  // Null if the rule has no scalar states.
  float* const* scalars() const {
    return extras != nullptr && extras->scalars[0] != nullptr ? extras->scalars : nullptr;
  }

  bool has_codes() const {
    bool result = false;
    for (const DType each : dtype) result |= is_code(each);
    return result;
  }
};

// A row's counter of finished steps, or null, and its scalar states, in a device's memory.
struct RowScalars {
  float* counter;
  float* scalars[kMaxScalarStates];
};

}  // namespace emopt
