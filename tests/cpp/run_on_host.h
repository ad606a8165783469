// The CUDA engine on the host: each block's threads run one after the other.
#pragma once

#include "engine/cuda/chunk.h"
#include "engine/cuda/plan.h"

// From `first_block` on.
template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks, uint32_t first_block = 0) {
  using namespace emopt::cuda;
  for (uint32_t block = first_block; block < num_blocks; ++block) {
    const uint32_t row = launch.row_of(block);
    double numbers[Launch::kNumbers];
    for (uint32_t i = 0; i < Launch::kNumbers; ++i) numbers[i] = read_number(launch, row, i);
    const auto setup =
        launch.needs_setup ? Setup<Launch>(launch, row, numbers) : Setup<Launch>(launch);
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

// What the engine does, where each device is a `chip`. `run(launch, num_blocks)` and
// `run(counters)` are to run what a device would.
template <class Rule, class Epilogue, class Table, class Run>
void sweep_on_host(const Rule& rule, const emopt::Number& step, const Epilogue& epilogue,
                   const Table& table, const emopt::cuda::Chip& chip, Run run) {
  const auto enqueue = [&](int8_t, const auto&... launch) { run(launch...); };
  emopt::cuda::for_each_launch(rule, step, epilogue, table, [&](int8_t) { return chip; }, enqueue);
  if constexpr (Epilogue::kHasRowSteps) {
    emopt::cuda::for_each_advance(table, epilogue.found_inf, enqueue);
  }
}
