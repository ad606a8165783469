// Which elements of a row a block and its threads hold.
#pragma once

#include <cstdint>

#include "../codes.h"
#include "launch.h"

namespace emopt::cuda {

// The threads that hold a group of codes.
inline constexpr uint32_t kGroupThreads = static_cast<uint32_t>(kGroup) / kHeld;
static_assert(kHeld % 4 == 0 && kGroup % kHeld == 0, "a vector of codes is a word or two");

// The elements of a row that one block sweeps.
template <class Launch>
struct Chunk {
  uint32_t row;
  int64_t begin;  // its first element
  uint32_t length;
  uint32_t head;  // elements before the body
  uint32_t body;  // elements that are accessed as vectors

  EMOPT_FN Chunk(const Launch& launch, uint32_t block) : row(launch.row_of(block)) {
    begin = static_cast<int64_t>(block - launch.first_block[row]) * launch.chunk;
    const int64_t remaining = launch.numel[row] - begin;
    const uint32_t peel = launch.peel[row];
    length = remaining < launch.chunk ? static_cast<uint32_t>(remaining) : launch.chunk;
    head = peel < length && peel != kNoPhase ? peel : length;  // 0 or all, if there are codes
    body = (length - head) / kHeld * kHeld;
  }

  // The address of element i of operand k. Reads the row's address from the launch each time:
  // keeping the addresses of all operands would take ten registers.
  template <class Bits>
  EMOPT_FN Bits* at(const Launch& launch, int k, uint32_t i) const {
    return static_cast<Bits*>(launch.data[k][row]) + (begin + i);
  }
};

// The elements of a chunk that a thread holds: in the body, kHeld contiguous ones; outside it,
// kHeld at a stride of kThreads. There are fewer elements outside than threads in a block, unless
// the body is empty. In launches with codes, they are contiguous everywhere, and a group's threads
// go through the chunk together.
template <class Launch>
struct Place {
  static constexpr uint32_t kStride = Launch::kHasCodes ? 1 : kThreads;  // outside the body

  const Chunk<Launch>& chunk;
  uint32_t thread;
  uint32_t at;  // an index in the body; from its length on, in the elements outside

  EMOPT_FN Place(const Chunk<Launch>& chunk_, uint32_t thread_)
      : chunk(chunk_), thread(thread_), at(thread_ * kHeld) {
    if (!Launch::kHasCodes && !is_vector()) at = chunk.body + thread;
  }

  EMOPT_FN bool is_vector() const { return at < chunk.body; }
  // In launches with codes: whether its group has any.
  EMOPT_FN bool has_any() const {
    return (Launch::kHasCodes ? at - at % static_cast<uint32_t>(kGroup) : at) < chunk.length;
  }
  EMOPT_FN uint32_t remaining() const {
    return Launch::kHasCodes && at >= chunk.length ? 0 : chunk.length - at;
  }
  // Whether it holds the i-th of its elements.
  EMOPT_FN bool has(uint32_t i) const { return is_vector() || i * kStride < remaining(); }
  EMOPT_FN uint32_t first() const {
    if (Launch::kHasCodes) return at;
    if (is_vector()) return chunk.head + at;
    return at - chunk.body < chunk.head ? at - chunk.body : at;
  }

  EMOPT_FN void advance() {
    const bool was_vector = is_vector();
    at += kTile;
    if (!Launch::kHasCodes && was_vector && !is_vector()) at = chunk.body + thread;
  }
};

}  // namespace emopt::cuda
