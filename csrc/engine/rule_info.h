// The description of a rule and its compiled code. Each rule's unit exports one (rule_unit.h); the
// engines' drivers and the bindings use a rule only through it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_or_device_scalar.h"
#include "operands.h"

// A hash of the headers that a rule's unit is compiled with (emerging_optimizers/_build.py).
#ifndef EMOPT_ABI
#define EMOPT_ABI 0
#endif
#ifndef EMOPT_CUDA
#define EMOPT_CUDA 0
#endif

namespace emopt {

namespace cuda {
struct Chip;
}

struct RuleInstance;

inline constexpr int kNumIsas = 3;        // indexed by cpu::Isa
inline constexpr int kNumEpilogues = 2;   // by Epilogue::kIndex
inline constexpr int kNumPrecisions = 2;  // by kPrecision<Real>
template <class Real>
inline constexpr int kPrecision = sizeof(Real) == sizeof(double) ? 1 : 0;

enum class Kind : uint8_t { kFloat, kFloats, kOptionalFloat, kFlag, kWarmupSteps, kStep };

struct HyperparameterInfo {
  const char* name;
  Kind kind;
  Domain domain;
  uint16_t length;  // of kFloats
  uint32_t offset;  // in the rule's struct
};

// Updates n contiguous elements of the arithmetic type; `operands` are in the order of a row's. The
// update may alias the gradient. The weight may alias the parameter and is then not written
// separately (`writes_weight` is false).
using ElementLoop = void (*)(const void* constants, const void* epilogue_at, void* const* operands,
                             int64_t n, bool writes_weight);

// Plans launches for rows (`Row<kOperands>`) of one CUDA device and one set of dtypes, and enqueues
// them on a cudaStream_t. Returns a cudaError_t.
using EnqueueRows = int (*)(const RuleInstance& rule, const HostOrDeviceScalar& step,
                            const void* epilogue, const void* const* rows, size_t num_rows,
                            const cuda::Chip& chip, void* stream);

// Enqueues, on a cudaStream_t, what advances the counters and the scalar states of rows, unless
// `found_inf` is nonzero. Rows without a counter have the step `step`. Returns a cudaError_t.
using EnqueueAdvance = int (*)(const RuleInstance& rule, const HostOrDeviceScalar& step,
                               const HostOrDeviceScalar& found_inf, const RowScalars* rows,
                               size_t num_rows, int8_t device, void* stream);

struct Program;

struct RuleInfo {
  uint64_t abi;  // the EMOPT_ABI that the unit was compiled with
  const char* name;
  const char* const* states;
  const HyperparameterInfo* hyperparameters;
  uint32_t num_states;
  uint32_t num_hyperparameters;
  uint32_t num_bytes;    // of the rule's struct
  int32_t correct_bias;  // the offsets of these flags; -1 if the rule does not have them
  int32_t use_shape_scaling;
  int32_t lowest_step;
  double (*shape_scale)(int64_t rows, int64_t cols);  // null if there is none
  void (*check)(const void* rule, ErrorText& error);  // null if there is none

  const StateCode* state_codes;  // one for each state; null if none may be stored as codes

  const ScalarState* scalar_states;
  uint32_t num_scalar_states;
  uint32_t scalars_offset;                           // in the rule's struct
  void (*advance)(RuleInstance& rule, double step);  // null if there are no scalar states

  uint32_t constants_bytes[kNumPrecisions];
  void (*make_constants[kNumPrecisions])(const RuleInstance& rule, double step, void* constants);
  bool (*keeps_weight[kNumPrecisions])(const void* constants);  // null if no step does
  ElementLoop loops[kNumIsas][kNumEpilogues][kNumPrecisions];   // null if not compiled
  EnqueueRows enqueue[kNumEpilogues][kNumPrecisions];           // null without CUDA
  EnqueueRows enqueue_codes;       // of rows with codes; null without CUDA, or if no state may be
  EnqueueAdvance enqueue_advance;  // null without CUDA, or without scalar states

  // Of a rule that is interpreted, else null: what it computes (program.h), and where its compiled
  // code is announced, whose loops replace the interpreter's from the next sweep on.
  const Program* program;
  const std::atomic<const RuleInfo*>* compiled;

  // The loop for an instruction set, or for the highest lower one that the unit was compiled for.
  // Null if it was compiled only for higher ones.
  template <class Epilogue, class Real>
  ElementLoop loop_of(int isa) const {
    const RuleInfo* info = this;
    if (compiled != nullptr) {
      const RuleInfo* const replacement = compiled->load(std::memory_order_acquire);
      if (replacement != nullptr) info = replacement;
    }
    const auto loop = [&] { return info->loops[isa][Epilogue::kIndex][kPrecision<Real>]; };
    while (isa > 0 && loop() == nullptr) --isa;
    return loop();
  }

  // A rule in a separate library may have none.
  bool has_cuda_kernels() const { return EMOPT_CUDA && enqueue[0][0] != nullptr; }

  // `row` is the first of those that are enqueued together.
  template <class Epilogue, int kOperands>
  EnqueueRows enqueue_of(const Row<kOperands>& row) const {
    if (row.has_codes()) return enqueue_codes;
    return enqueue[Epilogue::kIndex][row.compute == DType::kFloat64 ? 1 : 0];
  }
};

// Calls `visit` with the number of states as a constant.
template <class Visit>
auto with_num_states(uint32_t num_states, Visit visit) {
  switch (num_states) {
    case 0:
      return visit(std::integral_constant<int, 0>());
    case 1:
      return visit(std::integral_constant<int, 1>());
    case 2:
      return visit(std::integral_constant<int, 2>());
    case 3:
      return visit(std::integral_constant<int, 3>());
    case 4:
      return visit(std::integral_constant<int, 4>());
    default:
      static_assert(kMaxStates == 5);
      return visit(std::integral_constant<int, 5>());
  }
}

// A rule and the values of its hyperparameters.
struct RuleInstance {
  const RuleInfo* info;
  alignas(8) unsigned char bytes[kMaxRuleBytes];

  bool flag(int32_t offset) const { return offset >= 0 && bytes[offset] != 0; }
  double scalar(uint32_t i) const {
    double value;
    std::memcpy(&value, bytes + info->scalars_offset + i * sizeof(value), sizeof(value));
    return value;
  }
  void set_scalar(uint32_t i, double value) {
    std::memcpy(bytes + info->scalars_offset + i * sizeof(value), &value, sizeof(value));
  }
  // With bias correction steps count from 1, since it divides by 1 - beta^step.
  bool corrects_bias() const { return flag(info->correct_bias); }
  int64_t lowest_step() const { return corrects_bias() ? 1 : info->lowest_step; }
  bool scales_by_shape() const {
    return info->shape_scale != nullptr && flag(info->use_shape_scaling);
  }
};

}  // namespace emopt
