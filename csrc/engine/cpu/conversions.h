// Conversions between stored operands and buffers of the arithmetic type, a tile at a time, for
// each instruction set.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../stochastic.h"
#include "isa.h"

namespace emopt::cpu {

// Each converts n elements from `offset` on.
template <class Real>
struct Conversions {
  // Any dtype except those of split masters, for which there is join().
  void (*load)(Real* to, DType dtype, const void* from, int64_t offset, int64_t n);
  void (*join)(Real* to, const void* params, const void* remainders, int64_t offset, int64_t n);
  void (*store)(DType dtype, void* to, int64_t offset, const Real* from, int64_t n);
  // To bfloat16 or float16; `random` starts at the first of the n elements.
  void (*store_stochastically)(DType dtype, void* to, int64_t offset, const Real* from, int64_t n,
                               const RandomBits& random);
};

// `Real` is float or double.
template <class Real>
const Conversions<Real>& conversions(Isa isa);

}  // namespace emopt::cpu
