// What a norm of gradients sums, and in which order: the same bits from any engine.
//
// A tensor's elements, in memory order, are cut into blocks of kNormBlock, counted from the first.
// In a block, element i is added to lane i mod kNormLanes, in order; then the upper half of the
// lanes is added to the lower half until one is left. A tensor's block sums are reduced in the same
// way, kNormBlock at a time, and the results are added in order; then the tensors' sums are. All of
// it is float64, without contraction.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "operands.h"

namespace emopt {

// A block is short enough for many to run at a time, and long enough that adding up the lanes is a
// small part of it. The lanes are a warp's threads, and four vectors of AVX-512, whose additions
// take four cycles.
inline constexpr int64_t kNormBlock = 4096;
inline constexpr int kNormLanes = 32;

enum class NormOrder : uint8_t { kOne, kTwo, kInf };

// `term` is what an element contributes. The largest of values is NaN if one of them is.
template <NormOrder kOrder>
struct NormSum {
  static constexpr bool kIsLargest = kOrder == NormOrder::kInf;

  EMOPT_FN static double term(double x) { return kOrder == NormOrder::kTwo ? x * x : fabs(x); }
  EMOPT_FN static double add(double sum, double term) {
    if constexpr (kIsLargest) return term > sum || term != term ? term : sum;
    return sum + term;
  }
};

// Calls `visit(NormSum<order>())`.
template <class Visit>
EMOPT_FN decltype(auto) with_norm(NormOrder order, Visit visit) {
  if (order == NormOrder::kOne) return visit(NormSum<NormOrder::kOne>());
  if (order == NormOrder::kTwo) return visit(NormSum<NormOrder::kTwo>());
  return visit(NormSum<NormOrder::kInf>());
}

// Adds the upper half of the lanes to the lower half until one is left. Lanes from the n-th on are
// not read: they would be zeros, which change nothing.
template <class Norm>
EMOPT_FN double add_lanes(Norm norm, double (&lanes)[kNormLanes], int n) {
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane + half < n; ++lane) {
      lanes[lane] = norm.add(lanes[lane], lanes[lane + half]);
    }
    n = n < half ? n : half;
  }
  return lanes[0];
}

EMOPT_FN double add_in_order(NormOrder order, double sum, const double* sums, int64_t n) {
  return with_norm(order, [&](auto norm) {
    for (int64_t i = 0; i < n; ++i) sum = norm.add(sum, sums[i]);
    return sum;
  });
}

// The bits of NaNs depend on the processor.
EMOPT_FN double with_one_nan(double sum) {
  return sum == sum ? sum : bit_cast<double>(uint64_t{0x7ff8} << 48);
}

// Calls `visit` with a value of a gradient's stored type.
template <class Visit>
EMOPT_FN decltype(auto) with_grad_type(DType dtype, Visit visit) {
  if (dtype == DType::kFloat32) return visit(float());
  if (dtype == DType::kFloat64) return visit(double());
  if (dtype == DType::kBFloat16) return visit(BFloat16());
  return visit(Float16());
}

constexpr int64_t num_norm_blocks(int64_t numel) { return (numel + kNormBlock - 1) / kNormBlock; }

// A gradient whose elements lie in memory without gaps.
struct GradRow {
  const void* data;
  DType dtype;
  int64_t numel;        // not 0
  int64_t position;     // the index of its sum among the tensors' sums
  int64_t start;        // the number of elements in all earlier rows
  int64_t first_block;  // the number of blocks in all earlier rows
};

// The gradients on one device.
struct GradTable {
  int8_t device = kHost;  // or a CUDA device's index
  std::vector<GradRow> rows;
  int64_t numel = 0;
  int64_t num_blocks = 0;

  void append(GradRow row) {
    row.start = numel;
    row.first_block = num_blocks;
    numel += row.numel;
    num_blocks += num_norm_blocks(row.numel);
    rows.push_back(row);
  }
};

}  // namespace emopt
