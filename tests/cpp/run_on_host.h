// A launch of the CUDA kernel, run on the host: each block's threads, one pair after the other;
// from `first_block` on.
#pragma once

#include "engine/cuda/chunk.h"

template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks, uint32_t first_block = 0) {
  for (uint32_t block = first_block; block < num_blocks; ++block) {
    const uint32_t row = launch.row_of(block);
    const emopt::cuda::Setup<Launch> setup = launch.needs_setup
                                                 ? emopt::cuda::Setup<Launch>(launch, row)
                                                 : emopt::cuda::Setup<Launch>(launch);
    if (setup.is_skipped) continue;
    for (uint32_t thread = 0; thread < emopt::cuda::kThreads; thread += 2) {
      emopt::cuda::sweep_chunk<2>(launch, setup, row, block, thread);
    }
  }
}
