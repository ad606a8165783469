// Operands at any place in memory, and a rule applied to them element by element: what the engines'
// loops are compared with.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "engine/operands.h"

// An operand some elements into a buffer that AddressSanitizer knows the ends of. The buffer itself
// starts at a multiple of 16 bytes.
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
    }
  }
};

inline constexpr emopt::DType kTypes[] = {emopt::DType::kFloat32, emopt::DType::kFloat64,
                                          emopt::DType::kBFloat16, emopt::DType::kFloat16};

// The row of a table whose operands are `operands`.
template <int kOperands>
emopt::Row<kOperands> row_of(std::vector<Buffer>& operands, double scale) {
  emopt::Row<kOperands> row{};
  row.device = emopt::kHost;
  row.compute = emopt::DType::kFloat32;
  row.scale = scale;
  row.numel = operands[0].numel();
  for (size_t k = 0; k < kOperands; ++k) {
    row.data[k] = operands[k].data();
    row.dtype[k] = operands[k].dtype;
    if (k != emopt::kUpdate && row.dtype[k] == emopt::DType::kFloat64) row.compute = row.dtype[k];
  }
  return row;
}

template <class Rule, class Real, size_t... kState>
void apply_by_hand(const Rule& rule, double step, double scale, std::vector<Buffer>& operands,
                   std::index_sequence<kState...>) {
  const typename Rule::template Step<Real> step_of_rule(rule, step);
  for (int64_t i = 0; i < operands[0].numel(); ++i) {
    Real states[] = {static_cast<Real>(operands[emopt::kFirstState + kState].get(i))...};
    const Real grad = static_cast<Real>(operands[emopt::kGrad].get(i));
    const Real update = step_of_rule(grad, states[kState]...) * static_cast<Real>(scale);
    (operands[emopt::kFirstState + kState].put(i, states[kState]), ...);
    operands[emopt::kUpdate].put(i, update);
  }
}

// What a sweep makes of the row's operands.
template <class Rule>
void apply_by_hand(const Rule& rule, double step, const emopt::Row<emopt::kNumOperands<Rule>>& row,
                   std::vector<Buffer>& operands) {
  const auto states = std::make_index_sequence<emopt::kNumStates<Rule>>();
  if (row.compute == emopt::DType::kFloat64) {
    apply_by_hand<Rule, double>(rule, step, row.scale, operands, states);
  } else {
    apply_by_hand<Rule, float>(rule, step, row.scale, operands, states);
  }
}
