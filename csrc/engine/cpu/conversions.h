// Conversions between stored operands and buffers of the arithmetic type, a tile at a time, for
// each instruction set.
#pragma once

#include <cstdint>

#include "../codes.h"
#include "../dtypes.h"
#include "../stochastic.h"
#include "isa.h"

namespace emopt::cpu {

// Elements that are widened, computed and rounded together if an operand is not stored in the
// arithmetic type: few enough for all operands to stay in the L1 cache. Adam on one Zen 3 core with
// bfloat16 gradient and update and float32 states: over 32 Mi elements, 64 takes 1.16 times as
// long, 256 to 2048 take 1.09 to 1.15; over 1 Mi elements, which fit the cache, 256 and 512 take
// 0.9.
inline constexpr int64_t kTile = 128;

// Each converts n elements from `offset` on; codes, at most a tile.
template <class Real>
struct Conversions {
  // Any dtype except those of split masters and codes.
  void (*load)(Real* to, DType dtype, const void* from, int64_t offset, int64_t n);
  void (*join)(Real* to, const void* params, const void* remainders, int64_t offset, int64_t n);
  void (*store)(DType dtype, void* to, int64_t offset, const Real* from, int64_t n);
  // To bfloat16 or float16; `random` starts at the first of the n elements.
  void (*store_stochastically)(DType dtype, void* to, int64_t offset, const Real* from, int64_t n,
                               const RandomBits& random);
  // Codes, with the scales of their groups. `offset` is a multiple of a group's length.
  void (*decode)(Real* to, DType dtype, const void* codes, const uint8_t* scales, int64_t offset,
                 int64_t n);
  // The state's random bits are in `random`, see code_noise().
  void (*encode)(DType dtype, void* codes, uint8_t* scales, int64_t offset, const Real* from,
                 int64_t n, const uint32_t* random, int state);
  // Those of the n elements from `index` on.
  void (*fill_random)(uint32_t* to, uint64_t key, uint64_t index, int64_t n);
};

// `Real` is float or double.
template <class Real>
const Conversions<Real>& conversions(Isa isa);

}  // namespace emopt::cpu
