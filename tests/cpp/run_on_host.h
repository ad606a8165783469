// A launch of the CUDA kernel, run on the host: each block's threads, one after the other; from
// `first_block` on.
#pragma once

#include "engine/cuda/chunk.h"

template <class Launch>
emopt::cuda::Setup<Launch> setup_on_host(const Launch& launch, uint32_t row) {
  if (!launch.needs_setup) return emopt::cuda::Setup<Launch>(launch);
  double numbers[Launch::kNumbers];
  for (uint32_t i = 0; i < Launch::kNumbers; ++i) {
    numbers[i] = emopt::cuda::read_number(launch, row, i);
  }
  return {launch, row, numbers};
}

template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks, uint32_t first_block = 0) {
  for (uint32_t block = first_block; block < num_blocks; ++block) {
    const auto setup = setup_on_host(launch, launch.row_of(block));
    for (uint32_t thread = 0; thread < emopt::cuda::kThreads; ++thread) {
      emopt::cuda::sweep_chunk(launch, block, thread,
                               [&](uint32_t) { return [&] { return setup; }; });
    }
  }
}
