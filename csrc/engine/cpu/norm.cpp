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

template <class Norm, class Stored>
double sum_block(const NormLoops& loops, DType dtype, const Stored* from, int64_t n,
                 const void* ahead) {
  double lanes[kNormLanes] = {};
  const int64_t body = n - n % kNormLanes;
  if (body != 0) loops.add_to_lanes[static_cast<int>(dtype)](lanes, from, body, ahead);
  for (int64_t i = body; i < n; ++i) {
    double& lane = lanes[i - body];
    lane = Norm::add(lane, Norm::term(static_cast<double>(widen(from[i]))));
  }
  return add_lanes(Norm(), lanes, n);
}

}  // namespace

const NormLoops& norm_loops(NormOrder order, Isa isa) {
  return with_norm(order, [&](auto norm) -> const NormLoops& {
    using Norm = decltype(norm);
#if EMOPT_X86_UNITS
    if (isa == Isa::kAVX512) return avx512::kNormLoops<Norm>;
    if (isa == Isa::kAVX2) return avx2::kNormLoops<Norm>;
#endif
    static_cast<void>(isa);
    return baseline::kNormLoops<Norm>;
  });
}

void sum_blocks_between(NormOrder order, Isa isa, const GradTable& table, Place begin, Place end,
                        double* block_sums) {
  const NormLoops& loops = norm_loops(order, isa);
  for_each_part(table, begin, end, [&](const GradRow& row, int64_t from, int64_t to) {
    with_grad_type(row.dtype, [&](auto type) {
      using Stored = decltype(type);
      const Stored* const data = static_cast<const Stored*>(row.data);
      for (int64_t i = from; i < to; i += kNormBlock) {
        const int64_t n = std::min(to - i, kNormBlock);
        const void* const ahead = reinterpret_cast<const char*>(data + i) + kAheadBytes;
        double& sum = block_sums[row.first_block + i / kNormBlock];
        if (order == NormOrder::kInf) {
          sum = loops.find_largest[static_cast<int>(row.dtype)](data + i, n, ahead);
        } else if (order == NormOrder::kOne) {
          sum = sum_block<NormSum<NormOrder::kOne>>(loops, row.dtype, data + i, n, ahead);
        } else {
          sum = sum_block<NormSum<NormOrder::kTwo>>(loops, row.dtype, data + i, n, ahead);
        }
      }
    });
  });
}

double add_blocks(NormOrder order, const double* block_sums, int64_t num_blocks) {
  return with_norm(order, [&](auto norm) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < num_blocks; begin += kNormBlock) {
      const int64_t n = std::min(num_blocks - begin, kNormBlock);
      double lanes[kNormLanes] = {};
      for (int64_t i = 0; i < n; ++i) {
        double& lane = lanes[i % kNormLanes];
        lane = norm.add(lane, block_sums[begin + i]);
      }
      sum = norm.add(sum, add_lanes(norm, lanes, n));
    }
    return sum;
  });
}

double add_tensors(NormOrder order, const double* tensor_sums, int64_t num_tensors) {
  return with_one_nan(add_in_order(order, 0.0, tensor_sums, num_tensors));
}

}  // namespace emopt::cpu
