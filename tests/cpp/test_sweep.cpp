// The loops of each instruction set against a reference, for each rule and epilogue. Checks that
// nothing outside of a row is written: the elements before an operand are compared, and
// AddressSanitizer reports writes past its end.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "buffers.h"
#include "cases.h"
#include "check.h"
#include "engine/cpu/driver.h"
#include "engine/rule_unit.h"
#include "plugin_rules.h"

using namespace emopt;

EMOPT_RULE(PatientDescent)

namespace emopt {
const RuleInfo& info_of(const PatientDescent&) { return *emopt_rule_PatientDescent(); }
}  // namespace emopt

namespace {

// The result does not depend on where the table is cut.
template <class Epilogue, class Rule>
void check(const Rule& rule, cpu::Isa isa, std::mt19937_64& random) {
  const auto epilogue = random_epilogue<Epilogue>(random);
  Rows<Rule, Epilogue> rows;
  std::vector<int64_t> lengths{0, 1, 7, 31, 127, 128, 129, 300};
  if (random() % 16 == 0) lengths.push_back(4096 + static_cast<int64_t>(random() % 300));
  for (const int64_t numel : lengths) {
    std::vector<Buffer> operands;
    const bool is_uniform = random() % 2 == 0;
    const DType type = kTypes[random() % 4];
    for (size_t k = random_num_operands<Rule, Epilogue>(random); k > 0; --k) {
      const DType dtype = is_uniform ? type : kTypes[random() % 4];
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
  const auto at = [&](int64_t element) { return place_of(rows.table, element, cpu::kTile); };
  const cpu::Setup<Epilogue> setup(instance_of(rule), 3, epilogue, isa, rows.table.any_float64);
  for (size_t share = 0; share + 1 < cuts.size(); ++share) {
    cpu::sweep_between<kNumStates<Rule>>(setup, rows.table, at(cuts[share]), at(cuts[share + 1]));
  }
  rows.check();
}

void test_lr_0(cpu::Isa isa) {
  std::mt19937_64 random(0);
  const auto sweep = [&](const auto& rule, double step, const ApplyUpdate& epilogue,
                         const auto& table) {
    constexpr int kStates = kNumStates<std::decay_t<decltype(rule)>>;
    const cpu::Setup<ApplyUpdate> setup(instance_of(rule), step, epilogue, isa, table.any_float64);
    cpu::sweep_between<kStates>(setup, table, {0, 0}, {1, 0});
  };
  for (int round = 0; round < 10; ++round) {
    for_each_rule([&](const auto& rule) { check_lr_0(rule, kHost, random, sweep); });
  }
}

// A step without an update, with a learning rate and weight decay.
void test_kept_weights(cpu::Isa isa) {
  std::mt19937_64 random(0);
  const auto sweep = [&](const auto& rule, double step, const ApplyUpdate& epilogue,
                         const auto& table) {
    const cpu::Setup<ApplyUpdate> setup(instance_of(rule), step, epilogue, isa, table.any_float64);
    cpu::sweep_between<1>(setup, table, {0, 0}, {1, 0});
  };
  for (int round = 0; round < 30; ++round) {
    check_kept_weights(patient_rules()[0], random_epilogue<ApplyUpdate>(random), kHost, random,
                       sweep);
  }
}

// Random bits depend on all 64 bits of an element's index.
void test_beyond_two_to_the_32(cpu::Isa isa) {
  const LongRow row((int64_t{1} << 32) + 1000, 1000 + 2 * cpu::kTile, kHost);
  const cpu::Setup<ApplyUpdate> setup(instance_of(row.rule), 1, row.epilogue, isa, false);
  cpu::sweep_between<kNumStates<Lion>>(setup, row.table, {0, row.first}, {1, 0});
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
    for (const auto& rule : patient_rules()) {
      for (int round = 0; round < 60; ++round) {
        check<StoreUpdate>(rule, isa, random);
        check<ApplyUpdate>(rule, isa, random);
      }
    }
    test_lr_0(isa);
    test_kept_weights(isa);
    test_beyond_two_to_the_32(isa);
  }
}
