// Runs a launch on the host, one thread after the other.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "engine/cuda/chunk.h"
#include "engine/cuda/launch.h"

template <class Launch>
emopt::cuda::Setup<Launch> setup_of(const Launch& launch, uint32_t row,
                                    const double (&scalars)[Launch::kScalars]) {
  if constexpr (emopt::kNumScalarStates<typename Launch::Rule> == 0) {
    return {launch, launch.rule, row, scalars};
  } else {
    return {launch, emopt::cuda::rule_at(launch, row, scalars), row, scalars};
  }
}

// Runs the threads of a block; those that hold a group together.
template <class Launch>
void run_block_with_codes(const Launch& launch, uint32_t block, emopt::cuda::Setup<Launch> setup) {
  using namespace emopt::cuda;
  using Held = HeldOperands<Launch>;
  if (setup.is_skipped) return;
  const Chunk<Launch> chunk(launch, block);
  setup.constants.epilogue.scale_by(launch.scale[chunk.row]);
  for (uint32_t first = 0; first < kThreads; first += kGroupThreads) {
    std::vector<Place<Launch>> places;
    for (uint32_t i = 0; i < kGroupThreads; ++i) places.emplace_back(chunk, first + i);
    while (places.front().has_any()) {
      // On a device they exchange ranks, so none has left.
      for (const auto& place : places) CHECK(place.has_any());
      std::vector<Held> held(kGroupThreads);
      std::vector<typename Held::Results> results(kGroupThreads);
      for (uint32_t i = 0; i < kGroupThreads; ++i) held[i].load(launch, places[i]);
      for (uint32_t i = 0; i < kGroupThreads; ++i) {
        held[i].step(launch, setup, places[i], results[i]);
      }
      for (int k = 0; k < Launch::kOperands; ++k) {
        const auto [_, largest] = std::minmax_element(
            results.begin(), results.end(),
            [k](const auto& a, const auto& b) { return a.ranks[k] < b.ranks[k]; });
        const int32_t rank = largest->ranks[k];
        for (auto& each : results) each.ranks[k] = rank;
      }
      for (uint32_t i = 0; i < kGroupThreads; ++i) {
        held[i].store(launch, setup, places[i], results[i]);
        places[i].advance();
      }
    }
  }
}

// Runs the blocks from `first_block` on.
template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks, uint32_t first_block = 0) {
  using namespace emopt::cuda;
  for (uint32_t block = first_block; block < num_blocks; ++block) {
    const uint32_t row = launch.row_of(block);
    double scalars[Launch::kScalars];
    for (uint32_t i = 0; i < Launch::kScalars; ++i) scalars[i] = read_scalar(launch, row, i);
    const auto setup = launch.needs_setup ? setup_of(launch, row, scalars) : Setup<Launch>(launch);
    if constexpr (Launch::kHasCodes) {
      run_block_with_codes(launch, block, setup);
    } else {
      for (uint32_t thread = 0; thread < kThreads; ++thread) {
        sweep_chunk(
            launch, block, thread, [&](uint32_t) { return [&] { return setup; }; }, [](auto&) {});
      }
    }
  }
}

inline void run_on_host(const emopt::cuda::Advance& counters) {
  for (uint32_t thread = 0; thread < emopt::cuda::kThreads; ++thread) {
    emopt::cuda::advance_counters(counters, thread, emopt::cuda::kThreads);
  }
}

template <class Rule>
void run_on_host(const emopt::cuda::AdvanceScalars<Rule>& advance) {
  for (uint32_t thread = 0; thread < emopt::cuda::kThreads; ++thread) {
    emopt::cuda::advance_scalars(advance, thread, emopt::cuda::kThreads);
  }
}
