// 8-bit codes of states: small floating-point numbers, times a power of two that a group of
// consecutive elements shares. The fallback has the same codes; _codes.py explains the formats.
#pragma once

#include <cstdint>
#include <limits>

#include "dtypes.h"

namespace emopt {

// The elements of a group: those of a tensor's last dimension, 32 at a time.
inline constexpr int64_t kGroup = 32;

// The last group of a row may be short.
EMOPT_FN int64_t num_groups(int64_t numel) { return (numel + kGroup - 1) / kGroup; }

// A format of codes as IEEE 754 has it, with subnormals and 3 bits of mantissa. The largest code is
// a NaN, which stands for infinities as well.
template <uint32_t kBias, bool kSigned>
struct CodeFormat {
  static constexpr uint32_t kSign = kSigned ? 0x80u : 0u;
  static constexpr uint32_t kNaN = kSigned ? 0x7fu : 0xffu;
  static constexpr uint32_t kNormal = 8;  // the first code that is not subnormal
  // A code plus this has the exponent and the mantissa of a float32 number.
  static constexpr uint32_t kRebias = (127u - kBias) << 3;
  static constexpr uint32_t kDropped = 20;  // bits of float32's mantissa
  // The exponent of the largest codes, which is 15 or 31 as stored.
  static constexpr uint32_t kLargest = (kSigned ? 15u : 31u) - kBias;

  EMOPT_FN static float smallest_normal() {
    return bit_cast<float>((kNormal + kRebias) << kDropped);
  }

  // The scale's code for a group whose largest finite magnitude has these bits: not even this one
  // may be rounded up to the NaN. At least 1, so that scales and their reciprocals are normal.
  EMOPT_FN static uint32_t scale_for(uint32_t largest) {
    const auto exponent = static_cast<int32_t>((largest + 0x1fffffu) >> 23);
    const int32_t scale = exponent - static_cast<int32_t>(kLargest);
    return static_cast<uint32_t>(scale > 1 ? scale : 1);
  }

  // The bits of a number's magnitude; those of a number that has no code are not finite.
  EMOPT_FN static uint32_t magnitude_of(float x) {
    if constexpr (kSigned) return bit_cast<uint32_t>(x) & 0x7fffffffu;
    return bit_cast<uint32_t>(x + 0.0f);  // -0 becomes 0; negative numbers are above infinity
  }
  EMOPT_FN static uint32_t finite_magnitude_of(float x) {
    const uint32_t magnitude = magnitude_of(x);
    return magnitude < 0x7f800000u ? magnitude : 0u;
  }

  // `noise` is less than 2^20, and rounds up where it carries. A code's own number is unchanged,
  // and a state that cannot be negative becomes 0 only if it is.
  EMOPT_FN static uint8_t encode(float x, float reciprocal_of_scale, uint32_t noise) {
    const uint32_t magnitude = magnitude_of(x);
    const float scaled = bit_cast<float>(magnitude) * reciprocal_of_scale;
    // The sum of a subnormal number and the smallest normal one is as coarse as its code.
    const bool is_subnormal = scaled < smallest_normal();
    const float shifted = scaled + (is_subnormal ? smallest_normal() : 0.0f);
    uint32_t code = (bit_cast<uint32_t>(shifted) + noise) >> kDropped;
    code -= kRebias + (is_subnormal ? kNormal : 0u);
    if constexpr (kSigned) {
      code = magnitude < 0x7f800000u ? code : kNaN;
      return static_cast<uint8_t>(code | (bit_cast<uint32_t>(x) >> 24 & kSign));
    } else {
      code = code == 0u && magnitude != 0u ? 1u : code;
      return static_cast<uint8_t>(magnitude < 0x7f800000u ? code : kNaN);
    }
  }

  EMOPT_FN static float decode(uint8_t code, float scale) {
    const uint32_t magnitude = code & ~kSign;
    const bool is_subnormal = magnitude < kNormal;
    const uint32_t rebiased = magnitude + kRebias + (is_subnormal ? kNormal : 0u);
    const float value =
        bit_cast<float>(rebiased << kDropped) - (is_subnormal ? smallest_normal() : 0.0f);
    const uint32_t bits = bit_cast<uint32_t>(value * scale) | (code & kSign) << 24;
    return bit_cast<float>(magnitude == kNaN ? 0x7fc00000u : bits);
  }
};

// OCP's E4M3, as in torch.float8_e4m3fn, for states of any sign; and E5M3 without a sign, whose
// square root covers as many powers of two.
using E4M3 = CodeFormat<7, true>;
using UE5M3 = CodeFormat<15, false>;

EMOPT_FN float scale_of(uint8_t code) { return bit_cast<float>(static_cast<uint32_t>(code) << 23); }
// Of a scale that scale_for() has chosen.
EMOPT_FN float reciprocal_of_scale(uint32_t code) { return bit_cast<float>((254u - code) << 23); }

// ---- rounding -----------------------------------------------------------------------------------

// Two states of a parameter share the random bits of an element: each uses 16 of them. This is the
// seed of a state's bits (stochastic.h).
EMOPT_FN uint64_t code_seed(int state) { return static_cast<uint64_t>(state) / 2; }

// The half that is added to what is rounded off makes the mean right.
EMOPT_FN uint32_t code_noise(int state, uint32_t random) {
  return (state % 2 == 0 ? random & 0xffffu : random >> 16) << 4 | 8u;
}

}  // namespace emopt
