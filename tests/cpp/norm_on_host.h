// Runs the kernels that add up gradients on the host, one thread after the other.
#pragma once

#include <algorithm>

#include "engine/cuda/norm_work.h"

// What a warp's shuffles do with the sums of its threads.
template <class Norm, class SumOfLane>
double add_lanes_on_host(Norm norm, SumOfLane sum_of_lane) {
  double lanes[emopt::kNormLanes];
  for (uint32_t lane = 0; lane < emopt::cuda::kWarp; ++lane) lanes[lane] = sum_of_lane(lane);
  return emopt::add_lanes(norm, lanes, emopt::kNormLanes);
}

template <size_t kBytes>
void run_on_host(const emopt::cuda::NormLaunch<kBytes>& launch) {
  using namespace emopt::cuda;
  emopt::with_norm(launch.order, [&](auto norm) {
    for (uint32_t block = 0; block < launch.num_blocks; ++block) {
      launch.block_sums[block] = add_lanes_on_host(
          norm, [&](uint32_t lane) { return sum_in_block(norm, launch, block, lane); });
    }
    for (uint32_t row = 0; row < launch.num_rows; ++row) {
      launch.tensor_sums[launch.position[row]] =
          sum_of_tensor(norm, launch, row,
                        [&](auto sum_of_lane) { return add_lanes_on_host(norm, sum_of_lane); });
    }
  });
}
