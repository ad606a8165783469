// Each instruction set's loops against each rule and epilogue, element by element. Nothing outside
// of a row is touched: what lies before an operand is compared, and AddressSanitizer knows where it
// ends.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "buffers.h"
#include "cases.h"
#include "check.h"
#include "engine/cpu/unit.h"

using namespace emopt;

namespace {

template <class Rule, class Epilogue>
cpu::SweepFunction<Rule, Epilogue> sweep_function(cpu::Isa isa) {
#if EMOPT_X86_UNITS
  if (isa == cpu::Isa::kAVX2) return cpu::avx2::sweep<Rule, Epilogue>;
  if (isa == cpu::Isa::kAVX512) return cpu::avx512::sweep<Rule, Epilogue>;
#endif
  static_cast<void>(isa);
  return cpu::baseline::sweep<Rule, Epilogue>;
}

// Wherever the table is cut.
template <class Epilogue, class Rule>
void check(const Rule& rule, cpu::Isa isa, std::mt19937_64& random) {
  const auto epilogue = random_epilogue<Epilogue>(random);
  Rows<Rule, Epilogue> rows;
  for (const int64_t numel : {0, 1, 7, 31, 127, 128, 129, 300}) {
    std::vector<Buffer> operands;
    const bool is_uniform = random() % 2 == 0;
    const DType type = kTypes[random() % 4];
    for (size_t k = random_num_operands<Rule, Epilogue>(random); k > 0; --k) {
      const DType dtype = is_uniform ? type : kTypes[random() % 4];
      operands.emplace_back(dtype, numel, random() % 5, random);
    }
    if (operands.size() == num_with_master<Rule, Epilogue>() && random() % 3 == 0) {
      halve(operands, random);
    }
    rows.add(std::move(operands), rule, 3, epilogue);
  }
  std::vector<int64_t> cuts{0, rows.table.numel};
  for (uint64_t extra = random() % 5; extra > 0; --extra) {
    cuts.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(rows.table.numel)));
  }
  std::sort(cuts.begin(), cuts.end());
  const auto at = [&](int64_t element) { return place_of(rows.table, element, cpu::kTile); };
  const cpu::Setup<Rule, Epilogue> setup(rule, 3, epilogue, rows.table);
  for (size_t share = 0; share + 1 < cuts.size(); ++share) {
    sweep_function<Rule, Epilogue>(isa)(setup, rows.table, at(cuts[share]), at(cuts[share + 1]));
  }
  rows.check();
}

void test_lr_0(cpu::Isa isa) {
  std::mt19937_64 random(0);
  const auto sweep = [&](const auto& rule, double step, const ApplyUpdate& epilogue,
                         const auto& table) {
    using Rule = std::decay_t<decltype(rule)>;
    sweep_function<Rule, ApplyUpdate>(isa)({rule, step, epilogue, table}, table, {0, 0}, {1, 0});
  };
  for (int round = 0; round < 10; ++round) {
    for_each_rule([&](const auto& rule) { check_lr_0(rule, kHost, random, sweep); });
  }
}

// Random bits depend on all of an element's index.
void test_beyond_two_to_the_32(cpu::Isa isa) {
  const LongRow row((int64_t{1} << 32) + 1000, 1000 + 2 * cpu::kTile, kHost);
  const cpu::Setup<Lion, ApplyUpdate> setup(row.rule, 1, row.epilogue, row.table);
  sweep_function<Lion, ApplyUpdate>(isa)(setup, row.table, {0, row.first}, {1, 0});
  row.check();
}

}  // namespace

int main() {
  for (const cpu::Isa isa : cpu::supported_isas()) {
    std::printf("%s\n", cpu::name(isa));
    std::mt19937_64 random(0);
    for_each_rule([&](const auto& rule) {
      for (int round = 0; round < 60; ++round) {
        check<StoreUpdate>(rule, isa, random);
        check<ApplyUpdate>(rule, isa, random);
      }
    });
    test_lr_0(isa);
    test_beyond_two_to_the_32(isa);
  }
}
