// The loops of each instruction set against a reference, for each rule and epilogue.
#include <cstdint>
#include <cstdio>
#include <random>

#include "cases.h"
#include "check_sweep.h"
#include "engine/cpu/driver.h"
#include "engine/rule_unit.h"
#include "plugin_rules.h"

using namespace emopt;

EMOPT_RULE(PatientDescent)

namespace emopt {
const RuleInfo& info_of(const PatientDescent&) { return *emopt_rule_PatientDescent(); }
}  // namespace emopt

namespace {

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
        check_sweep<StoreUpdate>(rule, isa, random);
        check_sweep<ApplyUpdate>(rule, isa, random);
      }
    });
    for (const auto& rule : patient_rules()) {
      for (int round = 0; round < 60; ++round) {
        check_sweep<StoreUpdate>(rule, isa, random);
        check_sweep<ApplyUpdate>(rule, isa, random);
      }
    }
    test_lr_0(isa);
    test_kept_weights(isa);
    test_beyond_two_to_the_32(isa);
  }
}
