// The work of one thread that adds up gradients. Also compiles for the host, as chunk.h does.
#pragma once

#include <cstdint>

#include "norm_launch.h"

namespace emopt::cuda {

inline constexpr uint32_t kWarp = 32;
static_assert(kWarp == kNormLanes, "a lane of a block is a thread of a warp");

// A lane's sum of up to kNormBlock elements. Those beyond the end count as zeros, which change
// nothing.
template <class Stored, class Add>
EMOPT_FN double sum_of_lane(const Stored* from, uint32_t n, uint32_t lane, Add add) {
  double sum = 0.0;
  EMOPT_NO_UNROLL
  for (uint32_t first = lane; first < n; first += kNormLoads * kWarp) {
    Stored held[kNormLoads] = {};
    EMOPT_UNROLL
    for (uint32_t k = 0; k < kNormLoads; ++k) {
      if (first + k * kWarp < n) held[k] = from[first + k * kWarp];
    }
    EMOPT_UNROLL
    for (uint32_t k = 0; k < kNormLoads; ++k) {
      sum = add(sum, static_cast<double>(widen(held[k])));
    }
  }
  return sum;
}

// The elements of part `part` of `total`, which is cut into parts of kNormBlock.
EMOPT_FN uint32_t length_of_part(int64_t total, uint32_t part) {
  const int64_t remaining = total - int64_t{part} * kNormBlock;
  return static_cast<uint32_t>(remaining < kNormBlock ? remaining : kNormBlock);
}

// A lane's sum of a block.
template <class Norm, class Launch>
EMOPT_FN double sum_in_block(Norm norm, const Launch& launch, uint32_t block, uint32_t lane) {
  const uint32_t row = launch.row_of(block);
  const uint32_t part = block - launch.first_block[row];
  const uint32_t n = length_of_part(launch.numel[row], part);
  return with_grad_type(launch.dtype[row], [&](auto type) {
    const auto* const from = static_cast<const decltype(type)*>(launch.data[row]);
    return sum_of_lane(from + int64_t{part} * kNormBlock, n, lane,
                       [&](double sum, double x) { return norm.add(sum, norm.term(x)); });
  });
}

// A tensor's sum. `add_lanes(sum_of_lane)` adds what a function gives for each lane.
template <class Norm, class Launch, class AddLanes>
EMOPT_FN double sum_of_tensor(Norm norm, const Launch& launch, uint32_t row, AddLanes add_lanes) {
  const uint32_t num_blocks = launch.num_blocks_of(row);
  const double* const block_sums = launch.block_sums + launch.first_block[row];
  double sum = 0.0;
  for (uint32_t part = 0; int64_t{part} * kNormBlock < num_blocks; ++part) {
    const uint32_t n = length_of_part(num_blocks, part);
    const double* const from = block_sums + int64_t{part} * kNormBlock;
    sum = norm.add(sum, add_lanes([&](uint32_t lane) {
                     return sum_of_lane(from, n, lane,
                                        [&](double a, double b) { return norm.add(a, b); });
                   }));
  }
  return sum;
}

}  // namespace emopt::cuda
