// What each instruction set's unit defines, and everything that its target region needs from
// outside. Functions that are defined out of line inside the region must not be shared with other
// units, so they live in the unit's own namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "../../rules/all.h"
#include "../operands.h"
#include "../stochastic.h"
#include "isa.h"

namespace emopt::cpu {

// Elements that are widened, computed and rounded together where an operand is not stored in the
// arithmetic type: small enough for all operands to stay in the L1 cache. Adam on one Zen 3 core
// with bfloat16 gradient and update and float32 states: over 32 Mi elements 64 takes 1.16 and 256
// to 2048 take 1.09 to 1.15 times as long; over 1 Mi, which fits the cache, 256 and 512 take 0.9.
inline constexpr int64_t kTile = 128;

// A rule and an epilogue at one step, for a table.
template <class Rule_, class Epilogue_>
class Setup {
 public:
  using Rule = Rule_;
  using Epilogue = Epilogue_;
  Constants<Rule, Epilogue, float> float32;
  const Constants<Rule, Epilogue, double>* float64 = nullptr;  // where any row needs them
  Epilogue epilogue;
  double step;

  Setup(const Rule& rule, double step_, const Epilogue& epilogue_,
        const Table<kNumOperands<Rule, Epilogue>>& table)
      : float32(rule, step_, epilogue_), epilogue(epilogue_), step(step_) {
    if (table.any_float64) float64 = &float64_.emplace(rule, step_, epilogue_);
  }
  Setup(const Setup&) = delete;
  Setup& operator=(const Setup&) = delete;

 private:
  std::optional<Constants<Rule, Epilogue, double>> float64_;
};

template <class Rule, class Epilogue>
using SweepFunction = void (*)(const Setup<Rule, Epilogue>&,
                               const Table<kNumOperands<Rule, Epilogue>>&, Place, Place);

}  // namespace emopt::cpu

// Sweeps the rule over the rows between two places of a table, on the calling thread.
#define EMOPT_DECLARE_UNIT(unit)                                                                   \
  namespace emopt::cpu::unit {                                                                     \
  template <class Rule, class Epilogue>                                                            \
  void sweep(const Setup<Rule, Epilogue>& setup, const Table<kNumOperands<Rule, Epilogue>>& table, \
             Place begin, Place end);                                                              \
  }

EMOPT_DECLARE_UNIT(baseline)
#if EMOPT_X86_UNITS
EMOPT_DECLARE_UNIT(avx2)
EMOPT_DECLARE_UNIT(avx512)
#endif
#undef EMOPT_DECLARE_UNIT
