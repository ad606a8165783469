// 8-bit codes of states: small floating-point numbers, times a power of two that a group of
// consecutive elements shares. The fallback has the same codes; _codes.py explains the formats.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "stochastic.h"

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
  static constexpr int32_t kLargest = (kSigned ? 15 : 31) - static_cast<int32_t>(kBias);

  EMOPT_FN static float smallest_normal() {
    return bit_cast<float>((kNormal + kRebias) << kDropped);
  }

  // The bits of a number's magnitude. Those of a number without a code are beyond the finite ones.
  EMOPT_FN static uint32_t magnitude_of(float x) {
    if constexpr (kSigned) return bit_cast<uint32_t>(x) & 0x7fffffffu;
    return bit_cast<uint32_t>(x + 0.0f);  // -0 becomes 0
  }

  // The scale's code for a group with the largest of these: not even that number may be rounded up
  // to the NaN. At least 1, so that scales and their reciprocals are normal. A rank grows with a
  // finite magnitude, and is at most `kLowestRank` if that is not finite.
  static constexpr int32_t kLowestRank = 0x00800000;
  EMOPT_FN static int32_t rank_of(float x) {
    return static_cast<int32_t>(magnitude_of(x) + static_cast<uint32_t>(kLowestRank));
  }
  EMOPT_FN static uint32_t scale_for(int32_t largest_rank) {
    const int32_t exponent = (largest_rank - kLowestRank + 0x1fffff) >> 23;
    return static_cast<uint32_t>(exponent - kLargest > 1 ? exponent - kLargest : 1);
  }

  // `noise` is less than 2^20, and rounds up where it carries. A number that has a code is
  // unchanged, and one that cannot be negative becomes 0 only if it is.
  EMOPT_FN static uint32_t encode(float x, float reciprocal_of_scale, uint32_t noise) {
    uint32_t magnitude = magnitude_of(x);
    if constexpr (!kSigned) magnitude = magnitude < 0x7f800000u ? magnitude : 0x7f800000u;
    const float scaled = bit_cast<float>(magnitude) * reciprocal_of_scale;
    // As a code and a fraction of 20 bits. The sum of a subnormal number and the smallest normal
    // one is as coarse as its code; the larger of the two is the right one.
    const auto normal = static_cast<int32_t>(bit_cast<uint32_t>(scaled) + (kNormal << kDropped));
    const auto subnormal = bit_cast<int32_t>(scaled + smallest_normal());
    const auto fixed = static_cast<uint32_t>(normal > subnormal ? normal : subnormal);
    constexpr uint32_t kZero = (kNormal + kRebias) << kDropped;
    const auto rounded = static_cast<int32_t>((fixed + (noise - kZero)) >> kDropped);
    const auto code = static_cast<uint32_t>(rounded < int32_t{kNaN} ? rounded : int32_t{kNaN});
    if constexpr (kSigned) return code | (bit_cast<uint32_t>(x) >> 24 & kSign);
    const uint32_t least = magnitude < 1u ? magnitude : 1u;
    return code > least ? code : least;
  }

  EMOPT_FN static float decode(uint8_t code, float scale) {
    const uint32_t magnitude = code & ~kSign;
    const uint32_t rebiased = (magnitude + kRebias) << kDropped;
    // The smaller of the two is the right one.
    const auto normal = bit_cast<float>(rebiased);
    const float subnormal = bit_cast<float>(rebiased + (kNormal << kDropped)) - smallest_normal();
    const float value = normal < subnormal ? normal : subnormal;
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
// seed of a state's key (stochastic.h).
EMOPT_FN uint64_t code_seed(int state) { return static_cast<uint64_t>(state) / 2; }

// The random bits of consecutive elements: one hash of the index and the key, where weights, which
// use more of the bits, take two. The elements' indices have the same high 32 bits.
struct StateBits {
  uint32_t first, low, high;

  EMOPT_FN StateBits(uint64_t key, uint64_t index)
      : first(static_cast<uint32_t>(index)),
        low(static_cast<uint32_t>(key)),
        high(static_cast<uint32_t>(key >> 32) +
             RandomBits::kGolden * static_cast<uint32_t>(index >> 32)) {}

  // How many elements there are at most.
  EMOPT_FN int64_t count() const { return (int64_t{1} << 32) - first; }

  // The bits of the i-th element.
  EMOPT_FN uint32_t operator()(uint32_t i) const {
    uint32_t x = (first + i) ^ low;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15) ^ high) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }
};

// The 8 is half of what the 16 bits leave, which makes the mean right.
EMOPT_FN uint32_t code_noise(int state, uint32_t random) {
  return (state % 2 == 0 ? random << 16 >> 12 : random >> 16 << 4) + 8u;
}

}  // namespace emopt
