// Rounding to the 16-bit types by definition, in exact arithmetic: the reference for the engine's
// conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

struct Format {
  int mantissa_bits;
  int min_exponent;  // the smallest normal number's
  int max_exponent;

  double largest() const { return std::ldexp(2.0 - std::ldexp(1.0, -mantissa_bits), max_exponent); }
  // The exponent of the last mantissa bit of `x`.
  int last_place(double x) const {
    const int exponent = x == 0.0 ? min_exponent : std::max(std::ilogb(x), min_exponent);
    return exponent - mantissa_bits;
  }
};
inline constexpr Format kHalf{10, -14, 15};
inline constexpr Format kBrain{7, -126, 127};

// Rounds to nearest even: scales the last mantissa bit to 1 and uses nearbyint.
inline double rounded(double x, const Format& format) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int last_place = format.last_place(x);
  const double result = std::ldexp(std::nearbyint(std::ldexp(x, -last_place)), last_place);
  return std::abs(result) > format.largest() ? std::copysign(HUGE_VAL, x) : result;
}

// Rounds to the neighbour that the random bits choose, as defined in
// emerging_optimizers/_rounding.py.
inline double rounded_stochastically(float x, uint32_t random, const Format& format) {
  if (!std::isfinite(x)) return x;
  const double magnitude = std::abs(static_cast<double>(x));
  const int last_place = format.last_place(magnitude);
  const double units = std::ldexp(magnitude, -last_place);
  const double fraction = units - std::floor(units);
  const int dropped = 23 - format.mantissa_bits;
  const bool is_up = dropped == 13 && magnitude < std::ldexp(1.0, format.min_exponent)
                         ? fraction > std::ldexp(random >> 8, -24)
                         : fraction + std::ldexp(random >> (32 - dropped), -dropped) >= 1.0;
  const double result = std::ldexp(std::floor(units) + (is_up ? 1.0 : 0.0), last_place);
  return std::copysign(result > format.largest() ? HUGE_VAL : result, x);
}

// The random bits of an element, as defined there, modulo 2^32.
inline uint32_t random_bits(uint64_t key, uint64_t index) {
  constexpr uint64_t kModulus = uint64_t{1} << 32;
  const auto hashed = [](uint64_t x) {
    x = (x ^ x / 65536) * 0x7FEB352D % kModulus;
    x = (x ^ x / 32768) * 0x846CA68B % kModulus;
    return x ^ x / 65536;
  };
  const uint64_t block = (key / kModulus + 0x9E3779B9 * (index / kModulus)) % kModulus;
  return static_cast<uint32_t>(hashed(hashed((index ^ key) % kModulus) ^ block));
}

// Those for the rounding of states.
inline uint32_t state_bits(uint64_t key, uint64_t index) {
  constexpr uint64_t kModulus = uint64_t{1} << 32;
  const uint64_t block = (key / kModulus + 0x9E3779B9 * (index / kModulus)) % kModulus;
  uint64_t x = (index ^ key) % kModulus;
  x = (x ^ x / 65536) * 0x7FEB352D % kModulus;
  x = (x ^ x / 32768 ^ block) * 0x846CA68B % kModulus;
  return static_cast<uint32_t>(x ^ x / 65536);
}
