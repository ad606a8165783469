#include "traced_rule.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>

#include "../engine/cpu/step_program.h"
#include "../engine/cpu/tile_machine.h"
#include "../engine/program.h"
#if EMOPT_CUDA
#include "../engine/cuda/erased_enqueue.h"
#include "../engine/cuda/kernel_table.h"
#endif

namespace emopt {

namespace {

// A rule with all that its description refers to.
struct InterpretedRule {
  std::string name;
  std::vector<std::string> names;
  std::vector<const char*> states;
  std::vector<HyperparameterInfo> hyperparameters;
  std::vector<ScalarState> scalar_states;
  Program program;
  std::atomic<const RuleInfo*> compiled{nullptr};
  RuleInfo info{};
};

Kind kind_of(const std::string& kind) {
  if (kind == "number") return Kind::kFloat;
  if (kind == "numbers") return Kind::kFloats;
  if (kind == "optional") return Kind::kOptionalFloat;
  if (kind == "flag") return Kind::kFlag;
  TORCH_INTERNAL_ASSERT(kind == "step", kind);
  return Kind::kStep;
}

Domain domain_of(const std::string& domain) {
  if (domain == "kBeta") return Domain::kBeta;
  if (domain == "kNonNegative") return Domain::kNonNegative;
  if (domain == "kInteger") return Domain::kInteger;
  return Domain::kAny;
}

uint32_t rounded_up(uint32_t size, uint32_t unit) { return (size + unit - 1) / unit * unit; }

// Lays hyperparameters out as members of a struct, in their order, and then scalar states.
struct Layout {
  uint32_t scalars_offset, size;
};

Layout lay_out(std::vector<HyperparameterInfo>& hyperparameters, size_t num_scalar_states) {
  uint32_t size = 0, unit = 1;
  for (HyperparameterInfo& each : hyperparameters) {
    if (each.kind == Kind::kStep) continue;
    const bool is_flag = each.kind == Kind::kFlag;
    if (!is_flag) unit = sizeof(double);
    each.offset = is_flag ? size : rounded_up(size, sizeof(double));
    size = each.offset + (is_flag ? 1 : each.length * static_cast<uint32_t>(sizeof(double)));
  }
  if (num_scalar_states == 0) return {0, std::max(rounded_up(size, unit), 1u)};
  const uint32_t offset = rounded_up(size, sizeof(double));
  return {offset, offset + static_cast<uint32_t>(num_scalar_states * sizeof(double))};
}

int32_t offset_of_flag(const std::vector<HyperparameterInfo>& hyperparameters, const char* name) {
  for (const HyperparameterInfo& each : hyperparameters) {
    if (each.kind == Kind::kFlag && std::strcmp(each.name, name) == 0) {
      return static_cast<int32_t>(each.offset);
    }
  }
  return -1;
}

StepProgram step_program(const TracedRule& traced,
                         const std::vector<HyperparameterInfo>& hyperparameters,
                         uint32_t scalars_offset) {
  StepProgram program;
  for (const HyperparameterInfo& each : hyperparameters) {
    if (each.kind == Kind::kStep) continue;
    for (uint32_t i = 0; i < each.length; ++i) {
      program.sources.push_back(
          {each.offset + i * static_cast<uint32_t>(sizeof(double)), each.kind == Kind::kFlag});
    }
  }
  const size_t num_scalars = traced.scalar_states.size();
  for (size_t i = 0; i < num_scalars; ++i) {
    program.sources.push_back({scalars_offset + static_cast<uint32_t>(i * sizeof(double)), false});
  }
  program.registers.resize(1 + program.sources.size());
  const auto& constants = traced.step_constants;
  program.registers.insert(program.registers.end(), constants.begin(), constants.end());
  size_t last = program.registers.size() - 1;
  for (const auto& [instructions, condition, if_true, if_false, which, numbers, keeps_weight,
                    scalars] : traced.blocks) {
    StepBlock block;
    for (const auto& [name, to, a, b, c] : instructions) {
      const cpu::StepFunction function = cpu::step_function(name);
      TORCH_INTERNAL_ASSERT(function != nullptr, name);
      last = std::max<size_t>(last, to);
      TORCH_INTERNAL_ASSERT(a <= last && b <= last && c <= last);
      block.instructions.push_back({function, to, a, b, c});
    }
    block.is_end = condition < 0;
    block.condition = static_cast<uint16_t>(std::max(condition, 0));
    block.if_true = static_cast<uint16_t>(std::max(if_true, 0));
    block.if_false = static_cast<uint16_t>(std::max(if_false, 0));
    block.which = which;
    block.keeps_weight = keeps_weight;
    block.constants = numbers;
    block.scalars = scalars;
    TORCH_INTERNAL_ASSERT(!block.is_end || scalars.size() == num_scalars);
    const size_t index = program.blocks.size();
    TORCH_INTERNAL_ASSERT(block.is_end ||
                          (std::min(block.if_true, block.if_false) > index &&
                           std::max(block.if_true, block.if_false) < traced.blocks.size()));
    TORCH_INTERNAL_ASSERT(!block.is_end ||
                          (which >= 0 && static_cast<size_t>(which) < traced.cases.size()));
    program.blocks.push_back(std::move(block));
  }
  program.registers.resize(last + 1);
  return program;
}

TileProgram tile_program(const TracedRule::TileProgramText& text, const Program& program) {
  const auto& [instructions, update, num_buffers] = text;
  TileProgram result{{}, update, num_buffers};
  const uint32_t limit = program.first_buffer() + num_buffers;
  TORCH_INTERNAL_ASSERT(num_buffers <= cpu::kMaxTileBuffers && limit <= cpu::kMaxTileLocations);
  for (const auto& [name, form, to, a, b, c] : instructions) {
    const cpu::TileOp op = cpu::tile_op(name);
    TORCH_INTERNAL_ASSERT(op != cpu::TileOp::kCount, name);
    TORCH_INTERNAL_ASSERT(form < 8 && std::max({to, a, b, c}) < limit);
    result.instructions.push_back({static_cast<uint8_t>(op), form, to, a, b, c});
  }
  return result;
}

Program program_of(const TracedRule& traced, const std::vector<HyperparameterInfo>& hyperparameters,
                   uint32_t scalars_offset) {
  Program program;
  program.num_states = static_cast<uint32_t>(traced.states.size());
  program.num_constants = traced.num_constants;
  TORCH_INTERNAL_ASSERT(traced.num_constants <= StepConstants<double>::kMaxNumbers);
  program.step = step_program(traced, hyperparameters, scalars_offset);
  program.literals64 = traced.literals;
  for (const double literal : traced.literals) {
    program.literals32.push_back(static_cast<float>(literal));
  }
  for (const auto& text : traced.cases) program.cases.push_back(tile_program(text, program));
  return program;
}

bool is_same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

bool are_same(const RuleInfo& a, const RuleInfo& b) {
  if (!is_same(a.name, b.name) || a.num_states != b.num_states ||
      a.num_hyperparameters != b.num_hyperparameters || a.num_bytes != b.num_bytes ||
      a.num_scalar_states != b.num_scalar_states || a.scalars_offset != b.scalars_offset ||
      a.lowest_step != b.lowest_step) {
    return false;
  }
  for (uint32_t s = 0; s < a.num_states; ++s) {
    if (!is_same(a.states[s], b.states[s])) return false;
  }
  for (uint32_t i = 0; i < a.num_scalar_states; ++i) {
    if (!is_same(a.scalar_states[i].name, b.scalar_states[i].name)) return false;
  }
  for (uint32_t i = 0; i < a.num_hyperparameters; ++i) {
    const HyperparameterInfo &x = a.hyperparameters[i], &y = b.hyperparameters[i];
    if (!is_same(x.name, y.name) || x.kind != y.kind || x.length != y.length ||
        x.offset != y.offset) {
      return false;
    }
  }
  return std::equal(a.constants_bytes, a.constants_bytes + kNumPrecisions, b.constants_bytes);
}

}  // namespace

const RuleInfo* interpreted(const TracedRule& traced) {
  auto rule = std::make_unique<InterpretedRule>();
  rule->name = traced.name;
  rule->names = traced.states;
  for (const auto& [name, kind, domain, length] : traced.hyperparameters) {
    rule->names.push_back(name);
  }
  for (const auto& [name, first] : traced.scalar_states) rule->names.push_back(name);
  const size_t num_states = traced.states.size();
  const size_t num_scalars = traced.scalar_states.size();
  TORCH_INTERNAL_ASSERT(num_scalars <= kMaxScalarStates);
  for (size_t s = 0; s < num_states; ++s) rule->states.push_back(rule->names[s].c_str());
  for (size_t i = 0; i < traced.hyperparameters.size(); ++i) {
    const auto& [name, kind, domain, length] = traced.hyperparameters[i];
    rule->hyperparameters.push_back(
        {rule->names[num_states + i].c_str(), kind_of(kind), domain_of(domain), length, 0});
  }
  for (size_t i = 0; i < num_scalars; ++i) {
    const std::string& name = rule->names[rule->names.size() - num_scalars + i];
    rule->scalar_states.push_back({name.c_str(), traced.scalar_states[i].second});
  }
  RuleInfo& info = rule->info;
  const Layout layout = lay_out(rule->hyperparameters, num_scalars);
  info.num_bytes = layout.size;
  rule->program = program_of(traced, rule->hyperparameters, layout.scalars_offset);
  info.abi = EMOPT_ABI;
  info.name = rule->name.c_str();
  info.states = rule->states.data();
  info.hyperparameters = rule->hyperparameters.data();
  info.num_states = static_cast<uint32_t>(num_states);
  info.num_hyperparameters = static_cast<uint32_t>(rule->hyperparameters.size());
  info.correct_bias = offset_of_flag(rule->hyperparameters, "correct_bias");
  info.use_shape_scaling = -1;
  info.lowest_step = traced.lowest_step;
  info.scalar_states = rule->scalar_states.data();
  info.num_scalar_states = static_cast<uint32_t>(num_scalars);
  info.scalars_offset = layout.scalars_offset;
  if (num_scalars != 0) info.advance = &cpu::advance_scalars;
  info.constants_bytes[0] =
      static_cast<uint32_t>(StepConstants<float>::size(rule->program, traced.may_keep_weight));
  info.constants_bytes[1] =
      static_cast<uint32_t>(StepConstants<double>::size(rule->program, traced.may_keep_weight));
  info.make_constants[0] = &cpu::evaluate_step<float>;
  info.make_constants[1] = &cpu::evaluate_step<double>;
  info.keeps_weight[0] = &StepConstants<float>::keeps_weight;
  info.keeps_weight[1] = &StepConstants<double>::keeps_weight;
  const cpu::TileLoops tile_loops = cpu::tile_loops();
  std::memcpy(info.loops, tile_loops.loops, sizeof(info.loops));
#if EMOPT_CUDA
  rule->program.kernels = new cuda::KernelTable;  // lives as long as the description
  for (int epilogue = 0; epilogue < kNumEpilogues; ++epilogue) {
    for (int precision = 0; precision < kNumPrecisions; ++precision) {
      info.enqueue[epilogue][precision] =
          cuda::erased_enqueue(info.num_states, num_scalars != 0, epilogue, precision);
    }
  }
  info.enqueue_codes = cuda::erased_enqueue_codes(info.num_states, num_scalars != 0);
  if (num_scalars != 0) info.enqueue_advance = &cuda::erased_enqueue_advance;
#endif
  info.program = &rule->program;
  info.compiled = &rule->compiled;
  return &rule.release()->info;
}

void attach(const RuleInfo& interpreted, const RuleInfo& compiled, const std::string& path) {
  TORCH_INTERNAL_ASSERT(interpreted.compiled != nullptr, interpreted.name);
  TORCH_CHECK(are_same(interpreted, compiled), path,
              " has another rule than the one that was traced");
  auto* const announced = const_cast<std::atomic<const RuleInfo*>*>(interpreted.compiled);
  announced->store(&compiled, std::memory_order_release);
}

}  // namespace emopt
