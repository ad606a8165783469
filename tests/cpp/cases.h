// The cases of both engines' tests: every rule, with random options, dtypes and alignments.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <utility>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "engine/table.h"
#include "plugin_rules.h"
#include "rules.h"

template <size_t kCount, class Value>
Value one_of(const Value (&values)[kCount], std::mt19937_64& random) {
  return values[random() % kCount];
}

// All scalars are on the host, with values that float32 holds exactly.
template <class Epilogue>
Epilogue random_epilogue(std::mt19937_64& random) {
  Epilogue epilogue;
  if constexpr (Epilogue::kHasRowSteps) {
    using emopt::WeightDecay;
    epilogue.lr.value = one_of({0.0, 0.0009765625, 0.75, 1.5}, random);
    epilogue.grad_multiplier.value = one_of({1.0, 0.375}, random);
    epilogue.grad_scale.value = one_of({1.0, 3.0}, random);
    epilogue.weight_decay = one_of({0.0, 0.1, 0.8, 1.5}, random);
    epilogue.method = one_of(
        {WeightDecay::kDecoupled, WeightDecay::kIndependent, WeightDecay::kL2, WeightDecay::kPalm},
        random);
    epilogue.maximize = random() % 2 == 0;
    epilogue.is_stochastic = random() % 2 == 0;
    epilogue.seed = random();
  }
  return epilogue;
}

// The number of operands that a row needs: one fewer if the weight is the parameter.
template <class Rule, class Epilogue>
size_t random_num_operands(std::mt19937_64& random) {
  const auto all = static_cast<size_t>(kNumOperandsOf<Rule, Epilogue>);
  return all - (Epilogue::kOperands != 0 && random() % 2 == 0 ? 1 : 0);
}

// The number of operands with a master weight; 0 for epilogues without a weight.
template <class Rule, class Epilogue>
constexpr size_t num_with_master() {
  return Epilogue::kOperands != 0 ? static_cast<size_t>(kNumOperandsOf<Rule, Epilogue>) : 0;
}

// Makes a `grad_avg` so small that the variance of a centered rule is positive: the bits of a NaN
// are not promised.
template <class Rule>
void make_variance_positive(std::vector<Buffer>& operands) {
  if constexpr (emopt::kNumStates<Rule> > 1) {
    for (size_t k = 1; k < emopt::kNumStates<Rule>; ++k) {
      if (std::strcmp(Rule::kStates[k], "grad_avg") != 0) continue;
      const Buffer& square = operands[emopt::kFirstState];
      Buffer& average = operands[emopt::kFirstState + k];
      for (int64_t i = 0; i < average.numel(); ++i) average.put(i, std::sqrt(square.get(i)) / 2);
    }
  }
}

// Rows, and the expected contents of their operands.
template <class Rule, class Epilogue>
struct Rows {
  static constexpr int kOperands = kNumOperandsOf<Rule, Epilogue>;
  emopt::Table<kOperands> table;
  std::vector<std::vector<Buffer>> operands, expected;

  // Adds a row whose step is `step`.
  void add(std::vector<Buffer> row_operands, const Rule& rule, double step,
           const Epilogue& epilogue, int8_t device = emopt::kHost, float* counter = nullptr) {
    const size_t r = operands.size();
    make_variance_positive<Rule>(row_operands);
    operands.push_back(std::move(row_operands));
    expected.push_back(operands.back());
    auto row = row_of<kOperands>(operands.back(), r % 2 == 0 ? 1.0 : 0.3);
    row.device = device;
    row.position = r % 3 == 0 ? uint64_t{r} << 32 | 5 : 7 * r;
    // The high 32 bits of an index change at the first element, at a later one, or not at all.
    row.first_index = r == 0 ? 0 : (uint64_t{r} << 32) - 1 - 50 * (r - 1);
    row.step = counter;
    table.append(row);
    apply_by_hand(rule, step, epilogue, row, expected.back());
  }

  void check() const {
    for (size_t r = 0; r < operands.size(); ++r) {
      for (size_t k = 0; k < operands[r].size(); ++k) {
        CHECK(operands[r][k].bytes == expected[r][k].bytes);
      }
    }
  }
};

// No weight changes in a step 3 that leaves weights as they are, even if gradients are NaN.
// `sweep(rule, step, epilogue, table)` is the engine's function.
template <class Rule, class Sweep>
void check_kept_weights(const Rule& rule, const emopt::ApplyUpdate& epilogue, int8_t device,
                        std::mt19937_64& random, Sweep sweep) {
  constexpr int kOperands = kNumOperandsOf<Rule, emopt::ApplyUpdate>;
  for (const emopt::DType dtype : kTypes) {
    const bool has_master = emopt::size_of(dtype) == 2 && random() % 2 == 0;
    std::vector<Buffer> operands(kOperands - 1, Buffer(dtype, 300, random() % 5, random));
    for (int64_t i = 0; i < 300; ++i) operands[emopt::kGrad].put(i, HUGE_VAL - HUGE_VAL);
    if (has_master) operands.emplace_back(emopt::DType::kFloat32, 300, 0, random);
    if (has_master && random() % 2 == 0) {
      split(operands, random);
      operands[emopt::kUpdate].put_bits(7, 0x7fc1);  // a NaN, which must keep its bits
    } else if (has_master) {
      for (int64_t i = 0; i < 300; ++i) operands.back().put(i, operands[emopt::kUpdate].get(i));
    }
    const std::vector<Buffer> before = operands;
    emopt::Table<kOperands> table;
    auto row = row_of<kOperands>(operands, 1.0);
    row.device = device;
    table.append(row);
    sweep(rule, 3.0, epilogue, table);
    CHECK(operands[emopt::kUpdate].bytes == before[emopt::kUpdate].bytes);
    if (has_master) CHECK(operands.back().bytes == before.back().bytes);
    CHECK(std::isnan(operands[emopt::kFirstState].get(0)));
  }
}

template <class Rule, class Sweep>
void check_lr_0(const Rule& rule, int8_t device, std::mt19937_64& random, Sweep sweep) {
  auto epilogue = random_epilogue<emopt::ApplyUpdate>(random);
  epilogue.lr.value = 0.0;
  check_kept_weights(rule, epilogue, device, random, sweep);
}

// In step 3, the first waits, so that no weight changes, the second is free, the third clips. In
// later steps, none waits.
inline std::vector<emopt::PatientDescent> patient_rules() {
  return {{0.9, 3.0, 0.5}, {0.9, 0.0, std::nan("")}, {0.9, 2.0, 0.5}};
}

// A row that is too long for memory, in reserved address space. Uses Lion with stochastic rounding;
// only the last `num_last` elements are swept.
struct LongRow {
  static constexpr int kOperands = kNumOperandsOf<emopt::Lion, emopt::ApplyUpdate>;
  emopt::Lion rule{0.9, 0.99};
  emopt::ApplyUpdate epilogue;
  emopt::Table<kOperands> table;
  int64_t numel, first;

  LongRow(int64_t numel_, int64_t num_last, int8_t device, uint64_t first_index = 0)
      : numel(numel_), first(numel_ - num_last) {
    epilogue.lr.value = 0.001;
    epilogue.is_stochastic = true;
    epilogue.seed = 17;
    emopt::Row<kOperands> row{};
    row.device = device;
    row.numel = numel;
    row.scale = 1.0;
    row.first_index = first_index;
    for (int k = 0; k < kOperands; ++k) {
      row.dtype[k] = emopt::DType::kBFloat16;
      row.data[k] = k == kOperands - 1
                        ? row.data[emopt::kUpdate]
                        : mmap(nullptr, static_cast<size_t>(numel) * 2, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      CHECK(row.data[k] != MAP_FAILED);
    }
    table.append(row);
    for (int64_t i = first; i < numel; ++i) {
      *at(emopt::kUpdate, i) = emopt::Round<emopt::BFloat16>::from(1.0F);
      *at(emopt::kGrad, i) = emopt::Round<emopt::BFloat16>::from(-2.0F);
    }
  }
  ~LongRow() {
    for (int k = 0; k < kOperands - 1; ++k) {
      munmap(table.rows[0].data[k], static_cast<size_t>(numel) * 2);
    }
  }
  LongRow(const LongRow&) = delete;
  LongRow& operator=(const LongRow&) = delete;

  emopt::BFloat16* at(int k, int64_t i) const {
    return static_cast<emopt::BFloat16*>(table.rows[0].data[k]) + i;
  }

  // The step is 1.
  void check() const {
    const uint64_t key = emopt::rounding_key(epilogue.seed, 0, 1);
    const float weight = 1.0F + 0.001F;
    const auto average = emopt::Round<emopt::BFloat16>::from(-2.0F * static_cast<float>(1 - 0.99));
    for (int64_t i = first; i < numel; ++i) {
      const uint64_t index = table.rows[0].first_index + static_cast<uint64_t>(i);
      const uint32_t random = random_bits(key, index);
      CHECK(emopt::widen(*at(emopt::kUpdate, i)) == rounded_stochastically(weight, random, kBrain));
      CHECK(at(emopt::kFirstState, i)->bits == average.bits);
    }
    CHECK(emopt::widen(*at(emopt::kUpdate, 0)) == 0.0F);
    CHECK(emopt::widen(*at(emopt::kUpdate, first - 1)) == 0.0F);
  }
};
