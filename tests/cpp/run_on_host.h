// Runs a launch on the host, one thread after the other.
#pragma once

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

// Runs the blocks from `first_block` on.
template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks, uint32_t first_block = 0) {
  using namespace emopt::cuda;
  for (uint32_t block = first_block; block < num_blocks; ++block) {
    const uint32_t row = launch.row_of(block);
    double scalars[Launch::kScalars];
    for (uint32_t i = 0; i < Launch::kScalars; ++i) scalars[i] = read_scalar(launch, row, i);
    const auto setup = launch.needs_setup ? setup_of(launch, row, scalars) : Setup<Launch>(launch);
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      sweep_chunk(launch, block, thread, [&](uint32_t) { return [&] { return setup; }; });
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
