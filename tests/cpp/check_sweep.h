// A sweep on the CPU against a reference. Checks that nothing outside of a row is written: the
// elements before an operand are compared, and AddressSanitizer reports writes past its end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "buffers.h"
#include "cases.h"
#include "engine/cpu/driver.h"

// The result does not depend on where the table is cut.
template <class Epilogue, class Rule>
void check_sweep(const Rule& rule, emopt::cpu::Isa isa, std::mt19937_64& random) {
  const auto epilogue = random_epilogue<Epilogue>(random);
  Rows<Rule, Epilogue> rows;
  std::vector<int64_t> lengths{0, 1, 7, 31, 127, 128, 129, 300};
  if (random() % 16 == 0) lengths.push_back(4096 + static_cast<int64_t>(random() % 300));
  for (const int64_t numel : lengths) {
    std::vector<Buffer> operands;
    const bool is_uniform = random() % 2 == 0;
    const emopt::DType type = kTypes[random() % 4];
    for (size_t k = random_num_operands<Rule, Epilogue>(random); k > 0; --k) {
      const emopt::DType dtype = is_uniform ? type : kTypes[random() % 4];
      operands.emplace_back(dtype, numel, random() % 5, random);
    }
    if (operands.size() == num_with_master<Rule, Epilogue>() && random() % 3 == 0) {
      split(operands, random);
    }
    rows.add(std::move(operands), rule, 3, epilogue);
  }
  std::vector<int64_t> cuts{0, rows.table.numel};
  for (uint64_t extra = random() % 5; extra > 0; --extra) {
    cuts.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(rows.table.numel)));
  }
  std::sort(cuts.begin(), cuts.end());
  const auto at = [&](int64_t element) {
    return emopt::place_of(rows.table, element, emopt::cpu::kTile);
  };
  const emopt::cpu::Setup<Epilogue> setup(instance_of(rule), 3, epilogue, isa,
                                          rows.table.any_float64);
  for (size_t share = 0; share + 1 < cuts.size(); ++share) {
    emopt::cpu::sweep_between<emopt::kNumStates<Rule>>(setup, rows.table, at(cuts[share]),
                                                       at(cuts[share + 1]));
  }
  rows.check();
}
