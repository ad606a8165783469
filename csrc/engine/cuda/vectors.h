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

#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
template <class Vector>
using NativeOf = std::conditional_t<sizeof(Vector) == 16, uint4,
                                    std::conditional_t<sizeof(Vector) == 8, uint2, unsigned int>>;
#endif

template <class Vector>
EMOPT_FN Vector load_from(const Vector* from) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  return bit_cast<Vector>(__ldcs(reinterpret_cast<const NativeOf<Vector>*>(from)));
#endif
  return *from;
}

template <class Vector>
EMOPT_FN void store_to(Vector* to, const Vector& vector) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  using Native = NativeOf<Vector>;
  return __stcs(reinterpret_cast<Native*>(to), bit_cast<Native>(vector));
#endif
  *to = vector;
}

template <class Stored>
using BitsOf = std::conditional_t<sizeof(Stored) <= 2,
                                  std::conditional_t<sizeof(Stored) == 1, uint8_t, uint16_t>,
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

  // Loads every kStride-th of the first `remaining` elements, each 8- or 16-bit element into a
  // word. Packing several into a word, or widening after the selection, would make the next
  // operand's loads wait for this one's; pack_words() does that later.
  template <uint32_t kStride, class Bits>
  EMOPT_FN void load_singles(const Bits* from, uint32_t remaining) {
    using Word = std::conditional_t<(sizeof(Bits) < 4), uint32_t, Bits>;
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      Word word = 0;
      if (i * kStride < remaining) word = from[i * kStride];
      put(i, word);
    }
  }

  template <class Bits>
  EMOPT_FN void pack_words() {
    constexpr uint32_t kCount = kHeld * sizeof(Bits) / 4;
    EMOPT_UNROLL
    for (uint32_t w = 0; w < kCount; ++w) {
      if constexpr (sizeof(Bits) == 2) {
        words[w] = words[2 * w] | words[2 * w + 1] << 16;
      } else {
        words[w] =
            words[4 * w] | words[4 * w + 1] << 8 | words[4 * w + 2] << 16 | words[4 * w + 3] << 24;
      }
    }
  }

  template <uint32_t kStride, class Bits>
  EMOPT_FN void store_singles(Bits* to, uint32_t remaining) const {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      if (i * kStride < remaining) to[i * kStride] = get<Bits>(i);
    }
  }
};

}  // namespace emopt::cuda
