// The arguments of the kernels that add up gradients, and how launches are filled.
//
// The first kernel adds up blocks, one for each warp; the second the blocks of each tensor; the
// last all tensors. As for a step, everything that the host knows is in the arguments.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../norm.h"
#include "enqueue_rows.h"
#include "tuning.h"

namespace emopt::cuda {

struct NormHead {
  NormOrder order;
  uint32_t num_rows = 0;
  uint32_t num_blocks = 0;  // of all rows
  double* block_sums;       // of these rows' blocks
  double* tensor_sums;      // of all tensors
};

// Up to `kCapacity` gradients on one device, in at most `kBytes` bytes. Used by two kernels.
template <size_t kBytes_>
struct NormLaunch : NormHead {
  static constexpr size_t kBytes = kBytes_;
  static constexpr size_t kRowBytes =
      sizeof(void*) + sizeof(int64_t) + 2 * sizeof(uint32_t) + sizeof(DType);
  static constexpr uint32_t kCapacity =
      static_cast<uint32_t>((kBytes - sizeof(NormHead) - alignof(void*)) / kRowBytes);

  const void* data[kCapacity];
  int64_t numel[kCapacity];
  uint32_t first_block[kCapacity];
  uint32_t position[kCapacity];  // of the tensor's sum
  DType dtype[kCapacity];

  explicit NormLaunch(const NormHead& head) : NormHead(head) {}

  // The row of a block: the last one whose first block is at or before it.
  EMOPT_FN uint32_t row_of(uint32_t block) const {
    uint32_t low = 0, high = num_rows;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
  EMOPT_FN uint32_t num_blocks_of(uint32_t row) const {
    return (row + 1 < num_rows ? first_block[row + 1] : num_blocks) - first_block[row];
  }
};

using SmallNormLaunch = NormLaunch<kSmallLaunch>;
using LargeNormLaunch = NormLaunch<kLargeLaunch>;

struct AddTensors {
  NormOrder order;
  const double* tensor_sums;
  int64_t num_tensors;
  double* sum;
};

// Fills one launch with rows from `first` on and passes it to `enqueue`. Returns the number of its
// rows; 0 if `enqueue` failed.
template <class Launch, class Enqueue>
size_t fill_norm_launch(NormHead head, const GradTable& table, size_t first, Enqueue& enqueue) {
  const GradRow* const rows = table.rows.data() + first;
  head.block_sums += rows[0].first_block;
  Launch launch(head);
  while (launch.num_rows < Launch::kCapacity && first + launch.num_rows < table.rows.size()) {
    const GradRow& row = rows[launch.num_rows];
    const int64_t num_blocks = launch.num_blocks + num_norm_blocks(row.numel);
    if (num_blocks > int64_t{UINT32_MAX} && launch.num_rows != 0) break;
    const uint32_t r = launch.num_rows++;
    launch.data[r] = row.data;
    launch.numel[r] = row.numel;
    launch.first_block[r] = launch.num_blocks;
    launch.position[r] = static_cast<uint32_t>(row.position);
    launch.dtype[r] = row.dtype;
    launch.num_blocks = static_cast<uint32_t>(num_blocks);
  }
  return enqueue(launch) ? launch.num_rows : 0;
}

// Passes a table's rows to `enqueue`, in as few launches as possible, until it returns false.
template <class Enqueue>
void plan_norm(const NormHead& head, const GradTable& table, const Chip& chip, Enqueue enqueue) {
  for (size_t first = 0; first < table.rows.size();) {
    const bool is_large =
        chip.takes_large_launches && table.rows.size() - first > SmallNormLaunch::kCapacity;
    const auto fill = is_large ? &fill_norm_launch<LargeNormLaunch, Enqueue>
                               : &fill_norm_launch<SmallNormLaunch, Enqueue>;
    const size_t done = fill(head, table, first, enqueue);
    if (done == 0) return;
    first += done;
  }
}

}  // namespace emopt::cuda
