// What each instruction set's unit defines, and everything that its target region needs from
// outside. Functions that are defined out of line inside the region must not be shared with other
// units, so they live in the unit's own namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../../rules/all.h"
#include "../epilogue.h"
#include "../operands.h"
#include "isa.h"

namespace emopt::cpu {

// Elements that are widened, computed and rounded together where an operand is not stored in the
// arithmetic type: small enough for all operands to stay in the L1 cache. With bfloat16 gradient
// and update and float32 states, 128 to 256 were fastest, 1024 took 1.4 times as long (Zen 3).
inline constexpr int64_t kTile = 128;

// A rule at one step, in both arithmetic types.
template <class Rule>
struct Steps {
  typename Rule::template Step<float> float32;
  typename Rule::template Step<double> float64;

  Steps(const Rule& rule, double step) : float32(rule, step), float64(rule, step) {}
};

template <class Rule>
using SweepFunction = void (*)(const Steps<Rule>&, const Table<kNumOperands<Rule>>&, Place, Place);

}  // namespace emopt::cpu

// Sweeps the rule over the rows between two places of a table, on the calling thread.
#define EMOPT_DECLARE_UNIT(unit)                                                            \
  namespace emopt::cpu::unit {                                                              \
  template <class Rule>                                                                     \
  void sweep(const Steps<Rule>& steps, const Table<kNumOperands<Rule>>& table, Place begin, \
             Place end);                                                                    \
  }

EMOPT_DECLARE_UNIT(baseline)
#if EMOPT_X86_UNITS
EMOPT_DECLARE_UNIT(avx2)
EMOPT_DECLARE_UNIT(avx512)
#endif
#undef EMOPT_DECLARE_UNIT
