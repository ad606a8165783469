#include "norm.h"

#include <algorithm>
#include <limits>

#include "../prefetch.h"

#define EMOPT_INCLUDE "norm_loop.inl"
#include "for_each_isa.inl"
#undef EMOPT_INCLUDE

namespace emopt::cpu {

namespace {

// As in element_loop.inl: hardware prefetches no further than to the end of a 4 KiB page.
constexpr int64_t kAheadBytes = 2048;

// What to prefetch while the elements of a row from `begin` on are read.
Ahead ahead_of(const GradRow& row, int64_t begin, const GradRow& next) {
  const int64_t offset = begin * size_of(row.dtype) + kAheadBytes;
  const int64_t remaining = row.numel * size_of(row.dtype) - offset;
  return {static_cast<const char*>(row.data) + offset, std::max(remaining, int64_t{0}),
          static_cast<const char*>(next.data)};
}

template <class Norm, class Stored>
double sum_block(Norm norm, SumLanes sum_lanes, const Stored* from, int64_t n, const Ahead& ahead) {
  double lanes[kNormLanes];
  const auto tail = static_cast<int>(n % kNormLanes);
  const int64_t body = n - tail;
  const auto term = [&](int lane) {
    return norm.term(static_cast<double>(widen(from[body + lane])));
  };
  if (body == 0) {
    for (int lane = 0; lane < tail; ++lane) lanes[lane] = term(lane);
    return add_lanes(norm, lanes, tail);
  }
  sum_lanes(lanes, from, body, ahead);
  for (int lane = 0; lane < tail; ++lane) lanes[lane] = norm.add(lanes[lane], term(lane));
  return add_lanes(norm, lanes, kNormLanes);
}

}  // namespace

const NormLoops& norm_loops(Isa isa) {
#if EMOPT_X86_UNITS
  if (isa == Isa::kAVX512) return avx512::kNormLoops;
  if (isa == Isa::kAVX2) return avx2::kNormLoops;
#endif
  static_cast<void>(isa);
  return baseline::kNormLoops;
}

void sum_blocks_between(NormOrder order, Isa isa, const GradTable& table, Place begin, Place end,
                        double* block_sums) {
  const NormLoops& loops = norm_loops(isa);
  const GradRow& last = table.rows.back();
  for_each_part(table, begin, end, [&](const GradRow& row, int64_t from, int64_t to) {
    const auto loop = static_cast<size_t>(row.dtype);
    const GradRow& next = &row == &last ? row : *(&row + 1);
    with_grad_type(row.dtype, [&](auto type) {
      const auto* const data = static_cast<const decltype(type)*>(row.data);
      for (int64_t i = from; i < to; i += kNormBlock) {
        const int64_t n = std::min(to - i, kNormBlock);
        const Ahead ahead = ahead_of(row, i, next);
        block_sums[row.first_block + i / kNormBlock] = with_norm(order, [&](auto norm) {
          if constexpr (norm.kIsLargest) return loops.find_largest[loop](data + i, n, ahead);
          return sum_block(norm, loops.sum_lanes[static_cast<int>(order)][loop], data + i, n,
                           ahead);
        });
      }
    });
  });
}

double add_blocks(NormOrder order, const double* block_sums, int64_t num_blocks) {
  if (num_blocks == 1) return block_sums[0];
  return with_norm(order, [&](auto norm) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < num_blocks; begin += kNormBlock) {
      const int64_t n = std::min(num_blocks - begin, kNormBlock);
      double lanes[kNormLanes] = {};
      for (int64_t i = 0; i < n; ++i) {
        double& lane = lanes[i % kNormLanes];
        lane = norm.add(lane, block_sums[begin + i]);
      }
      sum = norm.add(sum, add_lanes(norm, lanes, kNormLanes));
    }
    return sum;
  });
}

double add_tensors(NormOrder order, const double* tensor_sums, int64_t num_tensors) {
  return with_one_nan(add_in_order(order, 0.0, tensor_sums, num_tensors));
}

}  // namespace emopt::cpu
