// Elements on the way between memory and the arithmetic. All of the kernel's accesses to operands
// are in this file; `make cuda-check` reads the disassembly for that.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "launch.h"

namespace emopt::cuda {

// A vector is laid over elements of any type.
#if defined(__GNUC__)
#define EMOPT_MAY_ALIAS __attribute__((may_alias))
#else
#define EMOPT_MAY_ALIAS
#endif

template <uint32_t kBytes>
struct EMOPT_MAY_ALIAS Vector {
  alignas(kBytes) uint32_t words[kBytes / 4];
};

template <class Value>
EMOPT_FN Value load_from(const Value* from) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  if constexpr (sizeof(Value) == 16)
    return bit_cast<Value>(__ldcs(reinterpret_cast<const uint4*>(from)));
  if constexpr (sizeof(Value) == 8)
    return bit_cast<Value>(__ldcs(reinterpret_cast<const uint2*>(from)));
#endif
  return *from;
}

template <class Value>
EMOPT_FN void store_to(Value* to, const Value& value) {
#if defined(__CUDA_ARCH__) && EMOPT_STREAMING
  if constexpr (sizeof(Value) == 16)
    return __stcs(reinterpret_cast<uint4*>(to), bit_cast<uint4>(value));
  if constexpr (sizeof(Value) == 8)
    return __stcs(reinterpret_cast<uint2*>(to), bit_cast<uint2>(value));
#endif
  *to = value;
}

// Which elements of a chunk a thread holds at a time: kHeld side by side, or, where those could not
// be accessed by vectors, kHeld of which each is beside the next thread's.
struct Place {
  bool is_vector;
  uint32_t first;
  uint32_t left;  // elements from the first on that may be touched, where it is no vector

  EMOPT_FN uint32_t stride() const { return is_vector ? 1 : kThreads; }
};

// The elements that a thread holds of one operand, as they lie in memory. By words: an array of
// shorter elements would have to lie in memory, not in registers.
template <uint32_t kSize>
struct Packet {
  uint32_t words[kHeld * kSize / 4];

  template <class Stored>
  EMOPT_FN Stored get(uint32_t i) const {
    if constexpr (sizeof(Stored) == 2) {
      return bit_cast<Stored>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    } else if constexpr (sizeof(Stored) == 4) {
      return bit_cast<Stored>(words[i]);
    } else {
      return bit_cast<Stored>(static_cast<uint64_t>(words[2 * i + 1]) << 32 | words[2 * i]);
    }
  }

  // To be called for rising i, since each first half of a word clears the second.
  template <class Stored>
  EMOPT_FN void put(uint32_t i, Stored value) {
    if constexpr (sizeof(Stored) == 2) {
      const uint32_t bits = bit_cast<uint16_t>(value);
      words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
    } else if constexpr (sizeof(Stored) == 4) {
      words[i] = bit_cast<uint32_t>(value);
    } else {
      const auto bits = bit_cast<uint64_t>(value);
      words[2 * i] = static_cast<uint32_t>(bits);
      words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }

  // `Bits` is an unsigned integer of the type's size.
  template <class Bits>
  EMOPT_FN void load_vectors(const Bits* from) {
    constexpr uint32_t kBytes = vector_bytes(sizeof(Bits));
    EMOPT_UNROLL
    for (uint32_t w = 0; w < kHeld * sizeof(Bits) / 4; w += kBytes / 4) {
      const auto vector =
          load_from(reinterpret_cast<const Vector<kBytes>*>(from) + w / (kBytes / 4));
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kBytes / 4; ++i) words[w + i] = vector.words[i];
    }
  }

  template <class Bits>
  EMOPT_FN void store_vectors(Bits* to) const {
    constexpr uint32_t kBytes = vector_bytes(sizeof(Bits));
    EMOPT_UNROLL
    for (uint32_t w = 0; w < kHeld * sizeof(Bits) / 4; w += kBytes / 4) {
      Vector<kBytes> vector;
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kBytes / 4; ++i) vector.words[i] = words[w + i];
      store_to(reinterpret_cast<Vector<kBytes>*>(to) + w / (kBytes / 4), vector);
    }
  }

  // Of the first `left` elements, each kThreads-th. A word or two for each: to put two into a word,
  // a load would have to wait for another. join_halves() does that later.
  template <class Bits>
  EMOPT_FN void load_singles(const Bits* from, uint32_t left) {
    using Word = std::conditional_t<sizeof(Bits) == 2, uint32_t, Bits>;
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      put(i, static_cast<Word>(i * kThreads < left ? from[i * kThreads] : Bits{0}));
    }
  }

  EMOPT_FN void join_halves() {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld / 2; ++i) words[i] = words[2 * i] | words[2 * i + 1] << 16;
  }

  template <class Bits>
  EMOPT_FN void store_singles(Bits* to, uint32_t left) const {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      if (i * kThreads < left) to[i * kThreads] = get<Bits>(i);
    }
  }
};

}  // namespace emopt::cuda
