// A rule as data: what a rule that was traced from Python computes. The step's part is evaluated
// once per step (cpu/step_program.h), the elements' part tile by tile (cpu/tile_machine.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rule_info.h"

namespace emopt {

namespace cuda {
class KernelTable;
}

// ---- the step's part ----------------------------------------------------------------------------

// Registers hold doubles; flags are 0 or 1. The first one holds the step; then come the
// hyperparameters' numbers, scalar states, constants, and results of instructions.
struct StepInstruction {
  double (*apply)(double a, double b, double c);
  uint16_t to, a, b, c;
};

// Runs its instructions, then goes to another block, or ends with a case of the elements' part.
struct StepBlock {
  std::vector<StepInstruction> instructions;
  bool is_end;
  uint16_t condition;               // a register
  uint16_t if_true, if_false;       // blocks, which come later
  int32_t which;                    // the case
  bool keeps_weight;                // the step has no update
  std::vector<uint16_t> constants;  // the registers of the case's constants
  std::vector<uint16_t> scalars;    // the registers of the scalar states' new values
};

struct StepProgram {
  // Where a hyperparameter's number or a scalar state is in the rule's bytes.
  struct Source {
    uint32_t offset;
    bool is_flag;
  };

  std::vector<double> registers;  // their first values
  std::vector<Source> sources;
  std::vector<StepBlock> blocks;
};

// ---- the elements' part -------------------------------------------------------------------------

// Operands are locations: the gradient, the states, the step's constants, literals, then buffers.
// Constants and literals are scalars; each other location is a tile.
struct TileInstruction {
  uint8_t op;    // a TileOp
  uint8_t form;  // bit i: operand i is a scalar
  uint16_t to, a, b, c;
};

struct TileProgram {
  std::vector<TileInstruction> instructions;
  uint16_t update;  // its location, which is a tile
  uint16_t num_buffers;
};

// ---- the rule -----------------------------------------------------------------------------------

struct Program {
  uint32_t num_states;
  uint32_t num_constants;
  StepProgram step;
  std::vector<TileProgram> cases;
  std::vector<float> literals32;
  std::vector<double> literals64;
  cuda::KernelTable* kernels = nullptr;  // those compiled at run time; null without CUDA

  uint32_t first_constant() const { return 1 + num_states; }
  uint32_t first_literal() const { return first_constant() + num_constants; }
  uint32_t first_buffer() const {
    return first_literal() + static_cast<uint32_t>(literals64.size());
  }

  template <class Real>
  const Real* literals() const {
    if constexpr (sizeof(Real) == sizeof(double)) {
      return literals64.data();
    } else {
      return literals32.data();
    }
  }
};

// The constants of a step, in a buffer of kMaxConstantsBytes. They are laid out as in the `Step`
// that is written for the compiled rule (emerging_optimizers/_user_rules/emitter.py), so that its
// loops take them, too; the program comes last.
template <class Real>
class StepConstants {
 public:
  StepConstants(const Program& program, void* at)
      : bytes_(static_cast<unsigned char*>(at)), end_(program.num_constants * sizeof(Real)) {
    const Program* const address = &program;
    std::memcpy(bytes_ + kProgramAt, &address, sizeof(address));
  }

  void set(size_t i, double value) const {
    const auto number = static_cast<Real>(value);
    std::memcpy(bytes_ + i * sizeof(Real), &number, sizeof(number));
  }
  void set_case(int32_t which, bool keeps_weight) const {
    std::memcpy(bytes_ + end_, &which, sizeof(which));
    std::memcpy(bytes_ + end_ + sizeof(which), &keeps_weight, sizeof(keeps_weight));
  }

  static const Program& program_of(const void* at) {
    const Program* program;
    std::memcpy(&program, static_cast<const unsigned char*>(at) + kProgramAt, sizeof(program));
    return *program;
  }
  static int32_t case_of(const Program& program, const void* at) {
    int32_t which;
    std::memcpy(&which, after_numbers(program, at), sizeof(which));
    return which;
  }
  static bool keeps_weight(const void* at) {
    bool keeps;
    std::memcpy(&keeps, after_numbers(program_of(at), at) + sizeof(int32_t), sizeof(keeps));
    return keeps;
  }

  // The size of that `Step`.
  static size_t size(const Program& program, bool may_keep_weight) {
    const size_t used =
        program.num_constants * sizeof(Real) + sizeof(int32_t) + (may_keep_weight ? 1 : 0);
    const size_t unit = program.num_constants == 0 ? sizeof(int32_t) : sizeof(Real);
    return (used + unit - 1) / unit * unit;
  }
  static constexpr size_t kMaxNumbers = 60;

 private:
  static constexpr size_t kProgramAt = kMaxConstantsBytes - sizeof(const Program*);
  static_assert(kMaxNumbers * sizeof(double) + sizeof(int32_t) + sizeof(bool) <= kProgramAt);

  static const unsigned char* after_numbers(const Program& program, const void* at) {
    return static_cast<const unsigned char*>(at) + program.num_constants * sizeof(Real);
  }

  unsigned char* bytes_;
  size_t end_;
};

}  // namespace emopt
