// Drives a rule's element loops over rows: tiles, staging, conversions and stochastic rounding.
// Compiled once for all rules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "../codes.h"
#include "../epilogue.h"
#include "../rule_info.h"
#include "../table.h"
#include "conversions.h"
#include "isa.h"

namespace emopt::cpu {

// A rule and an epilogue at one step, in one arithmetic type.
template <class Epilogue, class Real>
struct Kernel {
  alignas(16) unsigned char constants[kMaxConstantsBytes];
  typename Epilogue::template At<Real> epilogue;
  ElementLoop loop;
  const Conversions<Real>* conversions;

  Kernel(const RuleInstance& rule, double step, const Epilogue& epilogue_, Isa isa)
      : epilogue(epilogue_),
        loop(rule.info->loop_of<Epilogue, Real>(static_cast<int>(isa))),
        conversions(&cpu::conversions<Real>(isa)) {
    rule.info->make_constants[kPrecision<Real>](rule, step, constants);
    const auto keeps_weight = rule.info->keeps_weight[kPrecision<Real>];
    if (keeps_weight != nullptr && keeps_weight(constants)) epilogue.hold();
  }
};

// The data that all rows of a table share.
template <class Epilogue>
struct Setup {
  Kernel<Epilogue, float> float32;
  std::optional<Kernel<Epilogue, double>> float64;  // only if a row needs it
  Epilogue epilogue;
  double step;

  Setup(const RuleInstance& rule, double step_, const Epilogue& epilogue_, Isa isa,
        bool any_float64)
      : float32(rule, step_, epilogue_, isa), epilogue(epilogue_), step(step_) {
    if (any_float64) float64.emplace(rule, step_, epilogue_, isa);
  }
};

// Sweeps the rows between two places of a table, on the calling thread.
template <int kStates, class Epilogue>
void sweep_between(const Setup<Epilogue>& setup,
                   const Table<kNumOperands<kStates, Epilogue>>& table, Place begin, Place end);

}  // namespace emopt::cpu
