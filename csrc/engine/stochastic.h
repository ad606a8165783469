// Stochastic rounding. The random bits are a hash of seed, parameter, step and element, so they
// need no state and are the same on every device. The fallback computes the same bits; _rounding.py
// explains the definitions.
#pragma once

#include <type_traits>

#include "dtypes.h"

namespace emopt {

EMOPT_FN uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

EMOPT_FN uint64_t rounding_key(uint64_t seed, uint64_t position, uint64_t step) {
  return mix(mix(mix(seed) ^ position) ^ step);
}

EMOPT_FN uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The random bits of fewer than 2^32 consecutive elements.
struct RandomBits {
  static constexpr uint32_t kGolden = 0x9E3779B9u;

  uint32_t first = 0;  // the low 32 bits of the first element's index
  uint32_t low = 0, high = 0;

  RandomBits() = default;
  EMOPT_FN RandomBits(uint64_t key, uint64_t index)
      : first(static_cast<uint32_t>(index)),
        low(static_cast<uint32_t>(key)),
        high(static_cast<uint32_t>(key >> 32) + kGolden * static_cast<uint32_t>(index >> 32)) {}

  // The bits of the i-th element, counted from the first one.
  EMOPT_FN uint32_t operator()(uint32_t i) const {
    const uint32_t index = first + i;
    const uint32_t carry = index < first ? kGolden : 0u;  // into the index's high 32 bits
    return hash(hash(index ^ low) ^ (high + carry));
  }
};

template <class To>
inline constexpr bool kRoundsStochastically =
    std::is_same_v<To, BFloat16> || std::is_same_v<To, Float16>;

// Rounds to one of the two neighbours. A value that the type can represent is unchanged.
template <class To>
struct RoundStochastically;

// Adds random bits to the lowest `kBits` bits, then clears these.
template <int kBits>
EMOPT_FN float with_noise(uint32_t magnitude, uint32_t random) {
  return bit_cast<float>((magnitude + (random >> (32 - kBits))) & ~((1u << kBits) - 1u));
}

inline constexpr uint32_t kSignBit = 0x80000000u;
inline constexpr uint32_t kInfinity = 0x7f800000u;

template <>
struct RoundStochastically<BFloat16> {
  EMOPT_FN static BFloat16 from(float x, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const bool is_finite = (bits & ~kSignBit) < kInfinity;
    return Round<BFloat16>::from(is_finite ? with_noise<16>(bits, random) : x);
  }
};

template <>
struct RoundStochastically<Float16> {
  EMOPT_FN static Float16 from(float x, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & ~kSignBit;
    // Below 2^-14, in units of 2^-24.
    const float units = bit_cast<float>(magnitude < 0x38800000u ? magnitude : 0u) * 16777216.0f;
    const auto integral = static_cast<float>(static_cast<int32_t>(units));
    const float chance = static_cast<float>(random >> 8) * (1.0f / 16777216.0f);
    const float tiny =
        (units - integral > chance ? integral + 1.0f : integral) * (1.0f / 16777216.0f);
    const float signed_tiny = bit_cast<float>(bit_cast<uint32_t>(tiny) | (bits & kSignBit));
    const float normal = magnitude < kInfinity ? with_noise<13>(bits, random) : x;
    return Round<Float16>::from(magnitude < 0x38800000u ? signed_tiny : normal);
  }
};

}  // namespace emopt
