// A launch of the CUDA kernel, run on the host: each block's threads, one pair after the other.
#pragma once

#include "engine/cuda/chunk.h"

template <class Launch>
void run_on_host(const Launch& launch, uint32_t num_blocks) {
  typename Launch::Step step = launch.step;
  if (launch.source.is_on_device()) {
    step = typename Launch::Step(launch.rule, emopt::cuda::read_step(launch.source));
  }
  for (uint32_t block = 0; block < num_blocks; ++block) {
    for (uint32_t thread = 0; thread < emopt::cuda::kThreads; thread += 2) {
      emopt::cuda::sweep_chunk<emopt::StoreUpdate, 2>(launch, step, block, thread);
    }
  }
}
