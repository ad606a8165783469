// The interpreter of each instruction set against the compiled rule, as in test_sweep.cpp: a rule
// with three cases, one without an update. And what advances scalar states.
#include <cstddef>
#include <cstdio>
#include <random>

#include "check_sweep.h"
#include "engine/cpu/step_program.h"
#include "engine/cpu/tile_machine.h"
#include "engine/rule_unit.h"
#include "plugin_rules.h"

using namespace emopt;

EMOPT_RULE(PatientDescent)
EMOPT_RULE(FourNumbers)

namespace {

StepInstruction step_instruction(const char* name, uint16_t to, uint16_t a, uint16_t b) {
  const cpu::StepFunction function = cpu::step_function(name);
  CHECK(function != nullptr);
  return {function, to, a, b, 0};
}

TileInstruction tile_instruction(const char* name, uint8_t form, uint16_t to, uint16_t a,
                                 uint16_t b) {
  const cpu::TileOp op = cpu::tile_op(name);
  CHECK(op != cpu::TileOp::kCount);
  return {static_cast<uint8_t>(op), form, to, a, b, 0};
}

// What PatientDescent computes. Its registers are the step, beta, patience and limit, 1, then
// results. Its locations are the gradient, the average, four constants, 0, then buffers.
Program patient_descent() {
  enum Register : uint16_t { kStep, kBeta, kPatience, kLimit, kOne, kRest, kWaits, kFree, kLow };
  enum Location : uint16_t { kGradient, kAverage, kK0, kK1, kK2, kK3, kZero, kBuffer, kOther };
  Program program;
  program.num_states = 1;
  program.num_constants = 4;
  program.literals32 = {0.0f};
  program.literals64 = {0.0};
  program.step.sources = {{0, false}, {8, false}, {16, false}};
  program.step.registers = {0, 0, 0, 0, 1, 0, 0, 0, 0};
  program.step.blocks = {
      {{step_instruction("-", kRest, kOne, kBeta),
        step_instruction("<=", kWaits, kStep, kPatience)},
       false,
       kWaits,
       1,
       2,
       -1,
       false,
       {},
       {}},
      {{}, true, 0, 0, 0, 0, true, {kBeta, kRest}, {}},
      {{step_instruction("!=", kFree, kLimit, kLimit)}, false, kFree, 3, 4, -1, false, {}, {}},
      {{}, true, 0, 0, 0, 1, false, {kBeta, kRest}, {}},
      {{step_instruction("neg", kLow, kLimit, 0)},
       true,
       0,
       0,
       0,
       2,
       false,
       {kBeta, kRest, kLow, kLimit},
       {}},
  };
  const std::vector<TileInstruction> average = {
      tile_instruction("*", 1, kBuffer, kK0, kAverage),
      tile_instruction("*", 1, kOther, kK1, kGradient),
      tile_instruction("+", 0, kAverage, kBuffer, kOther),
  };
  const auto with = [&](std::vector<TileInstruction> more, uint16_t update) {
    std::vector<TileInstruction> all = average;
    all.insert(all.end(), more.begin(), more.end());
    return TileProgram{all, update, 2};
  };
  program.cases = {
      with({tile_instruction("copy", 1, kBuffer, kZero, 0)}, kBuffer),
      with({}, kAverage),
      with({tile_instruction("max", 2, kOther, kAverage, kK2),
            tile_instruction("min", 2, kOther, kOther, kK3)},
           kOther),
  };
  return program;
}

struct Interpreted : PatientDescent {};

const RuleInfo& info_of(const Interpreted&) {
  static const Program program = patient_descent();
  static const std::atomic<const RuleInfo*> compiled{nullptr};
  static const RuleInfo info = [] {
    RuleInfo result = *emopt_rule_PatientDescent();
    const cpu::TileLoops tiles = cpu::tile_loops();
    std::memcpy(result.loops, tiles.loops, sizeof(result.loops));
    result.make_constants[0] = &cpu::evaluate_step<float>;
    result.make_constants[1] = &cpu::evaluate_step<double>;
    result.keeps_weight[0] = &StepConstants<float>::keeps_weight;
    result.keeps_weight[1] = &StepConstants<double>::keeps_weight;
    result.program = &program;
    result.compiled = &compiled;
    return result;
  }();
  return info;
}

// What FourNumbers::advance computes. The registers are the step, the rate, the scalar states, then
// results.
Program four_numbers(uint32_t scalars_offset) {
  enum Register : uint16_t { kStep, kRate, kTotal, kProduct, kLast, kAverage, k0, k1, k2, k3 };
  Program program;
  program.step.sources = {{offsetof(FourNumbers, rate), false}};
  for (uint32_t i = 0; i < 4; ++i) program.step.sources.push_back({scalars_offset + 8 * i, false});
  program.step.registers.resize(10);
  program.step.blocks = {
      {{step_instruction("+", k0, kTotal, kStep), step_instruction("*", k1, kProduct, kRate),
        step_instruction("-", k2, kLast, kAverage), step_instruction("*", k2, kRate, k2),
        step_instruction("+", k3, kAverage, k2)},
       true,
       0,
       0,
       0,
       0,
       false,
       {},
       {k0, k1, kStep, k3}}};
  return program;
}

// A compiled rule, and the program.
void test_scalar_states() {
  const RuleInfo& info = *emopt_rule_FourNumbers();
  CHECK(info.num_scalar_states == 4 && info.scalar_states[3].first == 0.5);
  CHECK(emopt_rule_PatientDescent()->num_scalar_states == 0);
  CHECK(emopt_rule_PatientDescent()->advance == nullptr);
  const Program program = four_numbers(info.scalars_offset);
  RuleInfo interpreted = info;
  interpreted.program = &program;
  FourNumbers expected{{0.0, 1.0, -1.0, 0.5}, 0.3};
  RuleInstance compiled{&info, {}};
  std::memcpy(compiled.bytes, &expected, sizeof(expected));
  RuleInstance other = compiled;
  other.info = &interpreted;
  for (double step = 1.0; step < 10.0; step += 1.0) {
    expected.advance(step);
    info.advance(compiled, step);
    cpu::advance_scalars(other, step);
    for (uint32_t i = 0; i < 4; ++i) {
      CHECK(compiled.scalar(i) == expected.scalars[i] && other.scalar(i) == expected.scalars[i]);
    }
  }
}

}  // namespace

int main() {
  test_scalar_states();
  for (const cpu::Isa isa : cpu::supported_isas()) {
    std::printf("%s\n", cpu::name(isa));
    std::mt19937_64 random(0);
    for (const PatientDescent& rule : patient_rules()) {
      for (int round = 0; round < 60; ++round) {
        check_sweep<StoreUpdate>(Interpreted{rule}, isa, random);
        check_sweep<ApplyUpdate>(Interpreted{rule}, isa, random);
      }
    }
  }
}
