// Rules that were traced from Python: interpreted, until their compiled code is attached.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../engine/rule_info.h"

namespace emopt {

// What Python has traced (_user_rules/assembler.py).
struct TracedRule {
  // The operation's name, the result's register, and the operands'.
  using StepInstructionText = std::tuple<std::string, uint16_t, uint16_t, uint16_t, uint16_t>;
  // Instructions; the condition, and the blocks if it is true and if not, or -1; the case, its
  // constants, whether the step has no update, and the new values of the scalar states.
  using StepBlockText = std::tuple<std::vector<StepInstructionText>, int, int, int, int,
                                   std::vector<uint16_t>, bool, std::vector<uint16_t>>;
  // The operation's name and form, the result's location, and the operands'.
  using TileInstructionText =
      std::tuple<std::string, uint8_t, uint16_t, uint16_t, uint16_t, uint16_t>;
  // Instructions, the update's location, and the number of buffers.
  using TileProgramText = std::tuple<std::vector<TileInstructionText>, uint16_t, uint16_t>;
  // Name, kind, domain, and the number of values.
  using HyperparameterText = std::tuple<std::string, std::string, std::string, uint16_t>;

  std::string name;
  std::vector<std::string> states;
  std::vector<HyperparameterText> hyperparameters;
  std::vector<std::pair<std::string, double>> scalar_states;  // with their first values
  int lowest_step;
  bool may_keep_weight;
  uint32_t num_constants;
  std::vector<double> step_constants;
  std::vector<StepBlockText> blocks;
  std::vector<double> literals;
  std::vector<TileProgramText> cases;
};

// Returns the description of an interpreted rule, which lives as long as the process.
const RuleInfo* interpreted(const TracedRule& traced);

// Replaces the interpreter of a rule by the compiled rule's loops, from the next sweep on. Raises
// if that is not the same rule.
void attach(const RuleInfo& interpreted, const RuleInfo& compiled, const std::string& path);

}  // namespace emopt
