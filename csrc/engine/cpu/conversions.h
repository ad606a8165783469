// Conversions between stored operands and buffers of the arithmetic type, a tile at a time, for
// each instruction set.
#pragma once

#include <cstdint>

#include "../codes.h"
#include "../dtypes.h"
#include "../stochastic.h"
#include "isa.h"

namespace emopt::cpu {

// Each converts n elements from `offset` on.
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
  void (*fill_random)(uint32_t* to, const RandomBits& random, int64_t n);
};

// `Real` is float or double.
template <class Real>
const Conversions<Real>& conversions(Isa isa);

}  // namespace emopt::cpu
