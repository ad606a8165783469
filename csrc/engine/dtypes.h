// The storage types, and the conversions between them and a rule's arithmetic type.
//
// Every conversion rounds once, to nearest even. Those of the 16-bit types use integer operations
// and exact floating-point ones, so that compilers vectorize them and the bits are the same on
// every instruction set. A NaN stays a NaN. CUDA devices convert with instructions, whose results
// are the same except for a NaN's payload. They are written as PTX, since CUDA's headers for these
// types take longer to compile than a kernel, and NVRTC comes without them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rules/rule.h"

namespace emopt {

// kSplitParam and kRemainder make up a split master, see SplitParam; the last two are codes of
// states, see codes.h.
enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kSplitParam,
  kRemainder,
  kE4M3,
  kUE5M3
};

EMOPT_FN bool is_code(DType dtype) { return dtype >= DType::kE4M3; }

EMOPT_FN int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : is_code(dtype) ? 1 : 2;
}

EMOPT_FN bool can_round_stochastically(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A split master: a bfloat16 parameter and a 16-bit remainder that together hold a float32 master
// weight, in TransformerEngine's encoding. The remainder is the low 16 bits; the parameter is the
// high 16 bits, plus 1 where the remainder is 0x8000 or more, which rounds to nearest.
struct SplitParam {
  uint16_t bits;
};
struct Remainder {
  uint16_t bits;
};

template <class To, class From>
EMOPT_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- widening: exact ----------------------------------------------------------------------------

EMOPT_FN float widen(float x) { return x; }
EMOPT_FN double widen(double x) { return x; }

EMOPT_FN float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

EMOPT_FN float widen(SplitParam x) { return widen(BFloat16{x.bits}); }  // the parameter alone

EMOPT_FN float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal: move the exponent's bias from 15 to 127; infinity and NaN: to all ones.
  const uint32_t bias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + bias;
  // Subnormal: add the mantissa to 0.5, whose unit in the last place is also 2^-24; subtract 0.5.
  const float subnormal = bit_cast<float>(0x3f000000u | magnitude) - 0.5f;
  return bit_cast<float>(sign | (magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : normal));
#endif
}

// The master weight.
EMOPT_FN float join(SplitParam param, Remainder remainder) {
  const uint32_t carry = remainder.bits >> 15;
  return bit_cast<float>((static_cast<uint32_t>(param.bits) - carry) << 16 | remainder.bits);
}

// ---- rounding: to nearest even ------------------------------------------------------------------

template <class To>
struct Round;

template <>
struct Round<double> {
  EMOPT_FN static double from(double x) { return x; }
  EMOPT_FN static double from(float x) { return x; }
};

template <>
struct Round<float> {
  EMOPT_FN static float from(double x) { return static_cast<float>(x); }
  EMOPT_FN static float from(float x) { return x; }

  // Round to odd: an inexact result becomes the neighbour whose last bit is set. Rounding it again,
  // to a type at least two bits shorter, gives the same as rounding `x` to that type directly.
  EMOPT_FN static float odd_from(double x) {
    const float nearest = static_cast<float>(x);
    const double back = nearest;
    const uint32_t bits = bit_cast<uint32_t>(nearest);
    const bool is_exact_or_odd = back == x || (bits & 1u) != 0;
    const double above = back < 0 ? -back : back;
    const double magnitude = x < 0 ? -x : x;
    const uint32_t odd = above > magnitude ? bits - 1u : bits + 1u;
    return bit_cast<float>(is_exact_or_odd ? bits : odd);
  }
};

template <>
struct Round<BFloat16> {
  EMOPT_FN static BFloat16 from(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
  }
  EMOPT_FN static BFloat16 from(double x) { return from(Round<float>::odd_from(x)); }
};

template <>
struct Round<Float16> {
  EMOPT_FN static Float16 from(float x) {
#if defined(__CUDA_ARCH__)
    Float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal: move the bias from 127 to 15 and round off 13 bits.
    const uint32_t normal =
        (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // Overflows from 65520 on, halfway between the largest number and the next power of two.
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
#endif
  }
  EMOPT_FN static Float16 from(double x) { return from(Round<float>::odd_from(x)); }
};

// Canonicalizes NaNs: rounding up could carry some payloads into infinity.
EMOPT_FN uint32_t master_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
}

template <>
struct Round<SplitParam> {
  EMOPT_FN static SplitParam from(float x) {
    return {static_cast<uint16_t>((master_bits(x) + 0x8000u) >> 16)};
  }
  EMOPT_FN static SplitParam from(double x) { return from(static_cast<float>(x)); }
};

template <>
struct Round<Remainder> {
  EMOPT_FN static Remainder from(float x) { return {static_cast<uint16_t>(master_bits(x))}; }
  EMOPT_FN static Remainder from(double x) { return from(static_cast<float>(x)); }
};

// Rounds to two values of a 16-bit type, packed with `low` in the low bits.
template <class To, class Real>
EMOPT_FN uint32_t round_pair(Real low, Real high) {
  return Round<To>::from(low).bits | static_cast<uint32_t>(Round<To>::from(high).bits) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two 16-bit values. Were it copied trivially, the compiler would merge the code that stores
// results of the two types, and a kernel would take five more registers.
struct Pair {
  uint32_t bits;

  Pair() = default;
  EMOPT_FN Pair(const Pair& other) : bits(other.bits) {}
};
EMOPT_FN uint32_t bits_of(Pair pair) { return pair.bits; }

// One instruction, which takes `high` first.
template <>
EMOPT_FN uint32_t round_pair<Float16>(float low, float high) {
  Pair pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair.bits) : "f"(high), "f"(low));
  return bits_of(pair);
}
template <>
EMOPT_FN uint32_t round_pair<BFloat16>(float low, float high) {
  Pair pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair.bits) : "f"(high), "f"(low));
  return bits_of(pair);
}
#endif

}  // namespace emopt
