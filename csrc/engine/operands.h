// A row: the tensors at one position of parallel lists, without their types.
//
// Its operands are the update (or the parameter that it is applied to), the gradient, the states
// and the epilogue's, all of one length and one memory layout: element i of each is at index i.
#pragma once

#include <cstdint>
#include <iterator>
#include <type_traits>

#include "dtypes.h"
#include "epilogue.h"

namespace emopt {

inline constexpr int kUpdate = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;

inline constexpr int kMaxStates = 5;
// APPLY(number of states, epilogue): what is compiled once for all rules is instantiated for these.
#define EMOPT_FOR_EACH_SWEEP(APPLY) \
  EMOPT_FOR_EACH_NUM_STATES(APPLY, StoreUpdate) EMOPT_FOR_EACH_NUM_STATES(APPLY, ApplyUpdate)
#define EMOPT_FOR_EACH_NUM_STATES(APPLY, Epilogue) \
  APPLY(0, Epilogue)                               \
  APPLY(1, Epilogue) APPLY(2, Epilogue) APPLY(3, Epilogue) APPLY(4, Epilogue) APPLY(5, Epilogue)

template <class Rule, class = void>
inline constexpr int kNumStates = 0;
template <class Rule>
inline constexpr int kNumStates<Rule, std::void_t<decltype(Rule::kStates)>> =
    static_cast<int>(std::size(Rule::kStates));

template <int kStates, class Epilogue>
inline constexpr int kNumOperands = kFirstState + kStates + Epilogue::kOperands;

constexpr bool is_read(int k) { return k != kUpdate; }

// Whether operand k of a row is written at `data`. A weight that is the parameter itself, at
// `update`, is not: the parameter is written already.
template <class Epilogue, int kOperands>
EMOPT_FN bool is_written(int k, const void* data, const void* update) {
  return k != kGrad && (k < kOperands - Epilogue::kOperands || data != update);
}

// Whether the result is stored in operand k. A parameter that does not move keeps its bits, and so
// does its remainder; any other master weight is stored.
template <class EpilogueAt>
EMOPT_FN bool is_stored(int k, DType dtype, const EpilogueAt& epilogue) {
  return epilogue.stores() || (k != kUpdate && dtype != DType::kRemainder);
}

inline constexpr int8_t kHost = -1;  // as a device's index

template <int kOperands>
struct Row {
  void* data[kOperands];
  DType dtype[kOperands];
  DType compute;          // kFloat32, or kFloat64 where an operand that is read is float64
  int8_t device = kHost;  // or the index of a CUDA device
  // For the random bits: the parameter's index in its optimizer, plus 2^32 times that of a shard
  // whose bits differ from other shards'; and the index of the first element.
  uint64_t position = 0;
  uint64_t first_index = 0;
  double scale;           // a factor for the update (Signum's shape scaling), else 1
  float* step = nullptr;  // counts the parameter's finished steps, where that is on its device
  int64_t numel;
  int64_t start;  // the number of elements in all earlier rows
};

}  // namespace emopt
