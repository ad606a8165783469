// The accesses of the equal-phase loop. Every access to global memory in this file is of 16 bytes;
// `make cuda-check` reads the disassembly for that. A warp's accesses are side by side (but for
// float64, of whose 32-byte sectors two in a row cover half each).
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "tuning.h"

namespace emopt::cuda {

// A vector is laid over elements of any type.
#if defined(__GNUC__)
#define EMOPT_MAY_ALIAS __attribute__((may_alias))
#else
#define EMOPT_MAY_ALIAS
#endif

struct EMOPT_MAY_ALIAS Vector {
  alignas(kVectorBytes) uint32_t words[4];
};

// The elements that a thread holds of one operand, as they lie in memory: four of the tile's first
// half, then four of its second. So a warp's vectors of float32 are side by side, and those of
// shorter types can be made so by exchange().
struct Packet {
  Vector vectors[4];  // the first 1, 2 or 4, by the size of the type

  EMOPT_FN uint32_t& word(uint32_t i) { return vectors[i / 4].words[i % 4]; }
  EMOPT_FN uint32_t word(uint32_t i) const { return vectors[i / 4].words[i % 4]; }

  // Element i, as one of that type. By words: an array of shorter elements would have to lie in
  // memory, not in registers.
  template <class Stored>
  EMOPT_FN Stored get(uint32_t i) const {
    if constexpr (sizeof(Stored) == 2) {
      return bit_cast<Stored>(static_cast<uint16_t>(word(i / 2) >> (i % 2 * 16)));
    } else if constexpr (sizeof(Stored) == 4) {
      return bit_cast<Stored>(word(i));
    } else {
      return bit_cast<Stored>(static_cast<uint64_t>(word(2 * i + 1)) << 32 | word(2 * i));
    }
  }

  // To be called for rising i, since each first half of a word clears the second.
  template <class Stored>
  EMOPT_FN void put(uint32_t i, Stored value) {
    if constexpr (sizeof(Stored) == 2) {
      const uint32_t bits = bit_cast<uint16_t>(value);
      word(i / 2) = i % 2 == 0 ? bits : word(i / 2) | bits << 16;
    } else if constexpr (sizeof(Stored) == 4) {
      word(i) = bit_cast<uint32_t>(value);
    } else {
      const auto bits = bit_cast<uint64_t>(value);
      word(2 * i) = static_cast<uint32_t>(bits);
      word(2 * i + 1) = static_cast<uint32_t>(bits >> 32);
    }
  }
};

// Where a thread's elements are in a chunk's body, which is from `begin` to `end`, a multiple of
// kHeld elements. A thread that has none there reads what is at its begin.
struct Held {
  uint32_t begin;
  uint32_t end;
  uint32_t first;
  uint32_t second;
  bool is_odd;

  EMOPT_FN Held(uint32_t begin_, uint32_t end_, uint32_t tile, uint32_t thread)
      : begin(begin_),
        end(end_),
        first(tile + kHeld / 2 * thread),
        second(first + kTile / 2),
        is_odd((thread & 1) != 0) {}

  EMOPT_FN bool has_first() const { return first < end; }
  EMOPT_FN bool has_second() const { return second < end; }

  // Of 2-byte types, an even thread accesses the first halves of its own and the next thread's
  // elements, and the odd one the second halves: one vector each.
  EMOPT_FN uint32_t joint() const { return is_odd ? second - kHeld / 2 : first; }
  EMOPT_FN bool has_joint() const { return is_odd ? has_second() : has_first(); }
};

template <class Real>
EMOPT_FN void load_vectors(Packet& packet, DType dtype, const char* data, const Held& held) {
  const uint32_t first = held.has_first() ? held.first : held.begin;
  const uint32_t second = held.has_second() ? held.second : held.begin;
  const uint32_t joint = held.has_joint() ? held.joint() : held.begin;
  const auto at = [&](uint32_t element, uint32_t size) {
    return *reinterpret_cast<const Vector*>(data + element * size);
  };
  if (size_of(dtype) == 2) {
    packet.vectors[0] = at(joint, 2);
  } else if (sizeof(Real) == 4 || dtype == DType::kFloat32) {
    packet.vectors[0] = at(first, 4);
    packet.vectors[1] = at(second, 4);
  } else {
    packet.vectors[0] = at(first, 8);
    packet.vectors[1] = at(first + 2, 8);
    packet.vectors[2] = at(second, 8);
    packet.vectors[3] = at(second + 2, 8);
  }
}

template <size_t kSize>
EMOPT_FN void store_vectors(const Packet& packet, char* data, const Held& held) {
  const auto put = [&](uint32_t element, const Vector& vector) {
    *reinterpret_cast<Vector*>(data + element * kSize) = vector;
  };
  if constexpr (kSize == 2) {
    if (held.has_joint()) put(held.joint(), packet.vectors[0]);
  } else if constexpr (kSize == 4) {
    if (held.has_first()) put(held.first, packet.vectors[0]);
    if (held.has_second()) put(held.second, packet.vectors[1]);
  } else {
    if (held.has_first()) {
      put(held.first, packet.vectors[0]);
      put(held.first + 2, packet.vectors[1]);
    }
    if (held.has_second()) {
      put(held.second, packet.vectors[2]);
      put(held.second + 2, packet.vectors[3]);
    }
  }
}

}  // namespace emopt::cuda
