// Operands at any alignment, and a reference that applies a rule to them one element at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "engine/operands.h"
#include "engine/stochastic.h"
#include "rounding.h"

// An operand that starts at some element of a buffer, whose bounds AddressSanitizer checks. The
// buffer is aligned to 16 bytes.
struct Buffer {
  std::vector<unsigned char> bytes;
  size_t offset;
  emopt::DType dtype;

  // Filled with numbers from 0 to 2.
  Buffer(emopt::DType dtype_, int64_t numel, size_t elements_before, std::mt19937_64& random)
      : bytes((static_cast<size_t>(numel) + elements_before) * size(dtype_)),
        offset(elements_before * size(dtype_)),
        dtype(dtype_) {
    for (int64_t i = 0; i < numel; ++i) put(i, static_cast<double>(random() % 20001) / 10000.0);
  }

  void* data() { return bytes.data() + offset; }
  int64_t numel() const { return static_cast<int64_t>((bytes.size() - offset) / size(dtype)); }

  double get(int64_t i) const {
    double value = 0;
    with_type([&](auto stored) {
      std::memcpy(&stored, bytes.data() + offset + static_cast<size_t>(i) * sizeof(stored),
                  sizeof(stored));
      value = emopt::widen(stored);
    });
    return value;
  }

  // For 16-bit types only.
  uint16_t bits(int64_t i) const {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + offset + 2 * static_cast<size_t>(i), 2);
    return bits;
  }
  void put_bits(int64_t i, uint16_t bits) {
    std::memcpy(bytes.data() + offset + 2 * static_cast<size_t>(i), &bits, 2);
  }

  template <class Real>
  void put(int64_t i, Real value) {
    with_type([&](auto stored) {
      stored = emopt::Round<decltype(stored)>::from(value);
      std::memcpy(bytes.data() + offset + static_cast<size_t>(i) * sizeof(stored), &stored,
                  sizeof(stored));
    });
  }

 private:
  static size_t size(emopt::DType dtype) { return static_cast<size_t>(emopt::size_of(dtype)); }

  template <class Visit>
  void with_type(Visit visit) const {
    switch (dtype) {
      case emopt::DType::kFloat32:
        return visit(float());
      case emopt::DType::kFloat64:
        return visit(double());
      case emopt::DType::kBFloat16:
        return visit(emopt::BFloat16());
      case emopt::DType::kFloat16:
        return visit(emopt::Float16());
      case emopt::DType::kSplitParam:
      case emopt::DType::kRemainder:
        CHECK(!"not a value without the rest of its master");
      case emopt::DType::kE4M3:
      case emopt::DType::kUE5M3:
        CHECK(!"not a value without its scale");
    }
  }
};

inline constexpr emopt::DType kTypes[] = {emopt::DType::kFloat32, emopt::DType::kFloat64,
                                          emopt::DType::kBFloat16, emopt::DType::kFloat16};

// The row of `operands`. If the weight's operand is missing, the weight is the parameter.
template <int kOperands>
emopt::Row<kOperands> row_of(std::vector<Buffer>& operands, double scale) {
  emopt::Row<kOperands> row{};
  row.device = emopt::kHost;
  row.compute = emopt::DType::kFloat32;
  row.scale = scale;
  row.numel = operands[0].numel();
  for (size_t k = 0; k < kOperands; ++k) {
    Buffer& operand = operands[k < operands.size() ? k : emopt::kUpdate];
    row.data[k] = operand.data();
    row.dtype[k] = operand.dtype;
    if (k != emopt::kUpdate && row.dtype[k] == emopt::DType::kFloat64) row.compute = row.dtype[k];
  }
  return row;
}

// Turns the first and the last operand, parameter and master weight, into a split master.
inline void split(std::vector<Buffer>& operands, std::mt19937_64& random) {
  Buffer& param = operands[emopt::kUpdate];
  Buffer& master = operands.back();
  const int64_t numel = param.numel();
  for (Buffer* const operand : {&param, &master}) {
    const auto before = operand->offset / static_cast<size_t>(emopt::size_of(operand->dtype));
    *operand = Buffer(emopt::DType::kBFloat16, numel, before, random);
  }
  for (int64_t i = 0; i < numel; ++i) {
    param.put(i, param.get(i) + 0.5);  // not 0, which a remainder could turn into a NaN
    const uint64_t any = random();     // the remainder is often 0, or halfway between parameters
    master.put_bits(i, static_cast<uint16_t>(any % 8 == 0 ? any / 8 % 2 << 15 : any / 16));
  }
  param.dtype = emopt::DType::kSplitParam;
  master.dtype = emopt::DType::kRemainder;
}

inline float joined(uint16_t param, uint16_t remainder) {
  const uint32_t bits = param * 65536U + remainder - (remainder >= 32768 ? 65536U : 0U);
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ---- the reference ------------------------------------------------------------------------------

// Returns the rule's update of an element and updates its states.
template <class Step, class Real, size_t... kState>
Real update_by_hand(const Step& step, Real grad, std::vector<Buffer>& operands,
                    [[maybe_unused]] int64_t i, std::index_sequence<kState...>) {
  Real states[] = {static_cast<Real>(operands[emopt::kFirstState + kState].get(i))..., Real(0)};
  const Real update = step(grad, states[kState]...);
  (operands[emopt::kFirstState + kState].put(i, states[kState]), ...);
  return update;
}

template <class Real, class Rule, class Row>
void sweep_by_hand(const Rule& rule, double step, const emopt::StoreUpdate&, const Row& row,
                   std::vector<Buffer>& operands) {
  const typename Rule::template Step<Real> rule_step(rule, step);
  for (int64_t i = 0; i < row.numel; ++i) {
    const Real grad = static_cast<Real>(operands[emopt::kGrad].get(i));
    const Real update = update_by_hand(rule_step, grad, operands, i,
                                       std::make_index_sequence<emopt::kNumStates<Rule>>());
    operands[emopt::kUpdate].put(i, update * static_cast<Real>(row.scale));
  }
}

// Follows the definition of each option, independently of the engines. All scalars are on the host.
template <class Real, class Rule, class Row>
void sweep_by_hand(const Rule& rule, double step, const emopt::ApplyUpdate& options, const Row& row,
                   std::vector<Buffer>& operands) {
  using emopt::WeightDecay;
  if (options.found_inf.value != 0.0) return;
  const typename Rule::template Step<Real> rule_step(rule, step);
  const double lr = options.lr.value, decay = options.weight_decay;
  const auto factor = static_cast<Real>(options.grad_multiplier.value / options.grad_scale.value);
  double lost = 0.0;
  if (options.method == WeightDecay::kDecoupled) lost = lr * decay;
  if (options.method == WeightDecay::kIndependent) lost = decay;
  if (options.method == WeightDecay::kPalm) lost = lr * lr * decay;
  const auto kept = static_cast<Real>(lost < 0.5 ? 1.0 : 1.0 - lost);
  if (lost >= 0.5) lost = 0.0;
  constexpr Real kMax = std::numeric_limits<Real>::max();
  Buffer& param = operands[emopt::kUpdate];
  const size_t num_others = emopt::kFirstState + emopt::kNumStates<Rule>;
  Buffer* const master = operands.size() > num_others ? &operands.back() : nullptr;
  const bool is_split = param.dtype == emopt::DType::kSplitParam;
  for (int64_t i = 0; i < row.numel; ++i) {
    auto weight = static_cast<Real>(is_split            ? joined(param.bits(i), master->bits(i))
                                    : master != nullptr ? master->get(i)
                                                        : param.get(i));
    Real grad = factor * static_cast<Real>(operands[emopt::kGrad].get(i));
    if (options.maximize) grad = -grad;
    if (options.method == WeightDecay::kL2) grad += static_cast<Real>(decay) * weight;
    const Real update = update_by_hand(rule_step, grad, operands, i,
                                       std::make_index_sequence<emopt::kNumStates<Rule>>());
    if (lr == 0.0 || emopt::keeps_weight(rule_step)) continue;
    const Real rate = static_cast<Real>(lr) * static_cast<Real>(row.scale);
    const Real finite = std::min(std::max(weight, -kMax), kMax);
    weight = kept * weight - (static_cast<Real>(lost) * finite + rate * update);
    if (is_split) {
      uint32_t bits = 0;
      const auto stored = static_cast<float>(weight);
      std::memcpy(&bits, &stored, sizeof(bits));
      param.put_bits(i, static_cast<uint16_t>(bits / 65536 + (bits % 65536 >= 32768 ? 1 : 0)));
      master->put_bits(i, static_cast<uint16_t>(bits % 65536));
      continue;
    }
    if (master != nullptr) master->put(i, weight);
    if (options.is_stochastic && emopt::size_of(param.dtype) == 2) {
      const uint64_t key =
          emopt::rounding_key(options.seed, row.position, static_cast<uint64_t>(step));
      const Format& format = param.dtype == emopt::DType::kBFloat16 ? kBrain : kHalf;
      const uint32_t random = random_bits(key, row.first_index + static_cast<uint64_t>(i));
      param.put(i, rounded_stochastically(static_cast<float>(weight), random, format));
    } else {
      param.put(i, weight);
    }
  }
}

template <class Rule, class Epilogue, class Row>
void apply_by_hand(const Rule& rule, double step, const Epilogue& epilogue, const Row& row,
                   std::vector<Buffer>& operands) {
  if (row.compute == emopt::DType::kFloat64) {
    sweep_by_hand<double>(rule, step, epilogue, row, operands);
  } else {
    sweep_by_hand<float>(rule, step, epilogue, row, operands);
  }
}
