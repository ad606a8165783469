// Conversions: all 16-bit numbers, and rounding against the definition in exact arithmetic.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"
#include "engine/dtypes.h"
#include "rounding.h"

using emopt::BFloat16;
using emopt::bit_cast;
using emopt::Float16;
using emopt::join;
using emopt::Remainder;
using emopt::Round;
using emopt::SplitParam;
using emopt::widen;

namespace {

// The value of `bits`, by the definition of the format.
double value_of(uint16_t bits, Format format) {
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == format.max_exponent - format.min_exponent + 2) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const int places = format.mantissa_bits;
  if (exponent == 0) return sign * std::ldexp(mantissa, format.min_exponent - places);
  return sign * std::ldexp(mantissa + (1 << places), exponent - 1 + format.min_exponent - places);
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

template <class Stored>
void check_all_patterns(Format format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Stored stored{static_cast<uint16_t>(bits)};
    const double value = value_of(stored.bits, format);
    CHECK(same(widen(stored), value));
    // Converting back from both arithmetic types.
    const uint16_t from_float = Round<Stored>::from(static_cast<float>(value)).bits;
    const uint16_t from_double = Round<Stored>::from(value).bits;
    CHECK(std::isnan(value) || (from_float == stored.bits && from_double == stored.bits));
    CHECK(same(value_of(from_float, format), value) && same(value_of(from_double, format), value));
  }
}

template <class Stored>
void check_rounding(double x, Format format) {
  CHECK(same(widen(Round<Stored>::from(x)), rounded(x, format)));
  const float single = static_cast<float>(x);
  CHECK(same(widen(Round<Stored>::from(single)), rounded(single, format)));
}

template <class Stored>
void check_ties_and_neighbours(Format format) {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const double low = value_of(static_cast<uint16_t>(bits), format);
    double high = value_of(static_cast<uint16_t>(bits + 1), format);
    if (!std::isfinite(low)) break;
    if (std::isinf(high)) high = std::ldexp(1.0, format.max_exponent + 1);
    const double tie = low + (high - low) / 2;
    // Doubles next to a tie become the tie itself when rounded to float first.
    for (const double x : {tie, std::nextafter(tie, 0.0), std::nextafter(tie, HUGE_VAL)}) {
      check_rounding<Stored>(x, format);
      check_rounding<Stored>(-x, format);
    }
  }
}

template <class Stored>
void check_random(Format format) {
  std::mt19937_64 random(0);
  for (int round = 0; round < 1000000; ++round) {
    const double x = bit_cast<double>(random());
    check_rounding<Stored>(x, format);
    const float single = bit_cast<float>(static_cast<uint32_t>(random()));
    check_rounding<Stored>(single, format);
  }
}

template <class Stored>
void check_format(Format format) {
  check_all_patterns<Stored>(format);
  check_ties_and_neighbours<Stored>(format);
  check_random<Stored>(format);
  for (const double x : {0.0, HUGE_VAL, 1e300, 1e-300, 5e-324, std::nan("")}) {
    check_rounding<Stored>(x, format);
    check_rounding<Stored>(-x, format);
  }
}

// Split masters with all high 16 bits, and low bits around a tie. All NaNs become the same NaN.
void check_split_masters() {
  std::mt19937_64 random(0);
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low :
         {0U, 1U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU, static_cast<uint32_t>(random() % 0x10000)}) {
      const uint32_t bits = high << 16 | low;
      const auto master = bit_cast<float>(bits);
      const uint32_t wanted = std::isnan(master) ? 0x7fc00000U : bits;
      const auto param = Round<SplitParam>::from(master);
      const auto remainder = Round<Remainder>::from(master);
      CHECK(param.bits == static_cast<uint16_t>(wanted / 65536 + wanted % 65536 / 32768));
      CHECK(remainder.bits == wanted % 65536);
      CHECK(bit_cast<uint32_t>(join(param, remainder)) == wanted);
      if (std::isnan(master) || master == 0.0F) continue;
      // A float64 is first rounded to float32.
      const double beside = std::nextafter(static_cast<double>(master), 0.0);
      CHECK(Round<SplitParam>::from(beside).bits == param.bits);
      CHECK(std::isinf(master) || Round<Remainder>::from(beside).bits == remainder.bits);
    }
  }
}

}  // namespace

int main() {
  check_split_masters();
  check_format<Float16>(kHalf);
  check_format<BFloat16>(kBrain);
}
