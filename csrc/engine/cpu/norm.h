// Adds up the magnitudes of gradients, block by block. See ../norm.h for the order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../norm.h"
#include "../table.h"
#include "isa.h"

namespace emopt::cpu {

// A magnitude's bits as a signed integer. They are ordered as the magnitudes; those of NaNs come
// last.
template <class Stored>
using MagnitudeBits = std::conditional_t<sizeof(Stored) == 2, int16_t,
                                         std::conditional_t<sizeof(Stored) == 4, int32_t, int64_t>>;

// What to prefetch while a block is read: the bytes from `here` on, and after `num_here` of them
// those of the next gradient.
struct Ahead {
  const char* here;
  int64_t num_here;
  const char* next;

  EMOPT_FN const char* at(int64_t offset) const {
    return offset < num_here ? here + offset : next + (offset - num_here);
  }
};

// Sets the lanes to their sums.
using SumLanes = void (*)(double* lanes, const void* data, int64_t n, const Ahead& ahead);
using FindLargest = double (*)(const void* data, int64_t n, const Ahead& ahead);

// The loops of one instruction set, indexed by the order, kOne or kTwo, and the stored type.
struct NormLoops {
  SumLanes sum_lanes[2][4];  // n is a multiple of kNormLanes
  FindLargest find_largest[4];
};

const NormLoops& norm_loops(Isa isa);

// Stores the sums of the blocks between two places of a table, on the calling thread.
void sum_blocks_between(NormOrder order, Isa isa, const GradTable& table, Place begin, Place end,
                        double* block_sums);

// The sum of a tensor from those of its blocks.
double add_blocks(NormOrder order, const double* block_sums, int64_t num_blocks);

// The sum of all from those of the tensors.
double add_tensors(NormOrder order, const double* tensor_sums, int64_t num_tensors);

}  // namespace emopt::cpu
