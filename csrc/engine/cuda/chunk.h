// The work of one thread: sweeping a rule over its elements of a row's chunk.
//
// Also compiles for the host, where threads run one after the other. The tests run it there under
// AddressSanitizer and UndefinedBehaviorSanitizer, which report out-of-bounds and misaligned
// accesses.
#pragma once

#include <cstdint>

#include "held.h"
#include "launch.h"
#include "place.h"
#include "setup.h"

namespace emopt::cuda {

// `prepare(row)` returns a function that makes the setup. It may synchronize the block's threads
// and is called after the first loads were issued. `share(ranks)` makes the ranks of a thread's
// elements those of its groups.
template <class Launch, class Prepare, class Share>
EMOPT_FN void sweep_chunk(const Launch& launch, uint32_t block, uint32_t thread, Prepare prepare,
                          Share share) {
  const Chunk<Launch> chunk(launch, block);
  const auto make_setup = prepare(chunk.row);
  Place<Launch> next(chunk, thread);
  HeldOperands<Launch> next_held;
  if (next.has_any()) next_held.load(launch, next);
  Setup<Launch> setup = make_setup();
  if (setup.is_skipped || !next.has_any()) return;
  setup.constants.epilogue.scale_by(launch.scale[chunk.row]);
  do {
    const Place<Launch> place = next;
    HeldOperands<Launch> held = next_held;
    next.advance();
    if (kPrefetches && next.has_any()) next_held.load(launch, next);
    typename HeldOperands<Launch>::Results results;
    held.step(launch, setup, place, results);
    if constexpr (Launch::kHasCodes) share(results.ranks);
    held.store(launch, setup, place, results);
    if (!kPrefetches && next.has_any()) next_held.load(launch, next);
  } while (next.has_any());
}

// Advances the counters `first`, `first + stride`, and so on.
EMOPT_FN void advance_counters(const Advance& advance, uint32_t first, uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  for (uint32_t i = first; i < advance.count; i += stride) *advance.counters[i] += 1.0f;
}

// Advances the rows `first`, `first + stride`, and so on.
template <class Rule>
EMOPT_FN void advance_scalars(const AdvanceScalars<Rule>& advance, uint32_t first,
                              uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  const double step = advance.step.read();
  for (uint32_t i = first; i < advance.count; i += stride) {
    const RowScalars& row = advance.rows[i];
    const bool has_counter = row.counter != nullptr;
    const float count = has_counter ? *row.counter + 1.0f : 0.0f;
    Rule rule = advance.rule;
    double* const scalars = scalars_of(rule);
    for (int k = 0; k < kNumScalarStates<Rule>; ++k) {
      scalars[k] = static_cast<double>(*row.scalars[k]);
    }
    rule.advance(has_counter ? static_cast<double>(count) : step);
    for (int k = 0; k < kNumScalarStates<Rule>; ++k) {
      *row.scalars[k] = static_cast<float>(scalars[k]);
    }
    if (has_counter) *row.counter = count;
  }
}

}  // namespace emopt::cuda
