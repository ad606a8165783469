// Loads and stores a thread's elements of one operand. All accesses to operands are in this file;
// `make cuda-check` verifies that in the machine code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace emopt::cuda {

// May alias elements of any type.
template <uint32_t kBytes>
struct [[gnu::may_alias]] Vector {
  alignas(kBytes) uint32_t words[kBytes / 4];
};

template <class Vector>
EMOPT_FN Vector load_from(const Vector* from) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  using Native = std::conditional_t<sizeof(Vector) == 16, uint4, uint2>;
  return bit_cast<Vector>(__ldcs(reinterpret_cast<const Native*>(from)));
#endif
  return *from;
}

template <class Vector>
EMOPT_FN void store_to(Vector* to, const Vector& vector) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  using Native = std::conditional_t<sizeof(Vector) == 16, uint4, uint2>;
  return __stcs(reinterpret_cast<Native*>(to), bit_cast<Native>(vector));
#endif
  *to = vector;
}

template <class Stored>
using BitsOf = std::conditional_t<sizeof(Stored) == 2, uint16_t,
                                  std::conditional_t<sizeof(Stored) == 4, uint32_t, uint64_t>>;

// kHeld elements of kSize bytes each, as stored in memory.
template <uint32_t kSize>
struct Packet {
  uint32_t words[kHeld * kSize / 4];

  template <class Stored>
  EMOPT_FN Stored get(uint32_t i) const {
    Stored stored;
    memcpy(&stored, reinterpret_cast<const char*>(words) + i * sizeof(stored), sizeof(stored));
    return stored;
  }

  template <class Stored>
  EMOPT_FN void put(uint32_t i, Stored stored) {
    memcpy(reinterpret_cast<char*>(words) + i * sizeof(stored), &stored, sizeof(stored));
  }

  template <class Bits>
  EMOPT_FN void load_vectors(const Bits* from) {
    constexpr uint32_t kWords = vector_bytes(sizeof(Bits)) / 4;
    const auto* vector = reinterpret_cast<const Vector<4 * kWords>*>(from);
    EMOPT_UNROLL
    for (uint32_t w = 0; w < kHeld * sizeof(Bits) / 4; w += kWords) {
      const auto loaded = load_from(vector++);
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kWords; ++i) words[w + i] = loaded.words[i];
    }
  }

  template <class Bits>
  EMOPT_FN void store_vectors(Bits* to) const {
    constexpr uint32_t kWords = vector_bytes(sizeof(Bits)) / 4;
    auto* vector = reinterpret_cast<Vector<4 * kWords>*>(to);
    EMOPT_UNROLL
    for (uint32_t w = 0; w < kHeld * sizeof(Bits) / 4; w += kWords) {
      Vector<4 * kWords> stored;
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kWords; ++i) stored.words[i] = words[w + i];
      store_to(vector++, stored);
    }
  }

  // Loads every kThreads-th of the first `remaining` elements, each 16-bit element into a word.
  // Packing two into a word, or widening after the selection, would make the next operand's loads
  // wait for this one's; pack_words() does that later.
  template <class Bits>
  EMOPT_FN void load_singles(const Bits* from, uint32_t remaining) {
    using Word = std::conditional_t<sizeof(Bits) == 2, uint32_t, Bits>;
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      Word word = 0;
      if (i * kThreads < remaining) word = from[i * kThreads];
      put(i, word);
    }
  }

  EMOPT_FN void pack_words() {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld / 2; ++i) words[i] = words[2 * i] | words[2 * i + 1] << 16;
  }

  template <class Bits>
  EMOPT_FN void store_singles(Bits* to, uint32_t remaining) const {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      if (i * kThreads < remaining) to[i * kThreads] = get<Bits>(i);
    }
  }
};

}  // namespace emopt::cuda
