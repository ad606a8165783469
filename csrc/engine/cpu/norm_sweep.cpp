#include "norm_sweep.h"

#include <ATen/Parallel.h>

#include <vector>

#include "norm.h"

namespace emopt::cpu {

namespace {

constexpr int64_t kGrain = 16384;  // the fewest elements that are worth another thread

}  // namespace

void sum_tensors(NormOrder order, const GradTable& table, double* tensor_sums) {
  std::vector<double> block_sums(static_cast<size_t>(table.num_blocks));
  at::parallel_for(0, table.numel, kGrain, [&](int64_t begin, int64_t end) {
    sum_blocks_between(order, active_isa(), table, place_of(table, begin, kNormBlock),
                       place_of(table, end, kNormBlock), block_sums.data());
  });
  for (const GradRow& row : table.rows) {
    tensor_sums[row.position] =
        add_blocks(order, block_sums.data() + row.first_block, num_norm_blocks(row.numel));
  }
}

}  // namespace emopt::cpu
