// Stochastic rounding: its random bits, and the neighbour that they choose.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <random>

#include "check.h"
#include "engine/stochastic.h"
#include "rounding.h"

using emopt::BFloat16;
using emopt::bit_cast;
using emopt::Float16;
using emopt::RandomBits;
using emopt::Round;
using emopt::rounding_key;
using emopt::RoundStochastically;
using emopt::widen;

namespace {

// Values computed with Python integers from the definitions in emerging_optimizers/_rounding.py.
void test_known_bits() {
  CHECK(emopt::mix(0) == 0xe220a8397b1dcdafu);  // the first number of SplitMix64 with seed 0
  CHECK(rounding_key(0, 0, 0) == 0x238275bc38fcbe91u);
  CHECK(rounding_key(987654321, 0xffffffffu, uint64_t{1} << 40) == 0x5946ef75cb7d658cu);
  const uint64_t key = rounding_key(~uint64_t{0}, 3, 17);
  CHECK(key == 0x65596c1b15636d6eu);
  const struct {
    uint64_t index;
    uint32_t bits;
  } known[] = {{0, 0xc91d9e41u},
               {1, 0xfd960d70u},
               {12345, 0x0e404989u},
               {0xffffffffu, 0x35148517u},
               {uint64_t{1} << 32, 0xdeac2014u},
               {(uint64_t{5} << 32) + 7, 0xd78957bfu},
               {uint64_t{1} << 40, 0x57d5174bu}};
  for (const auto& one : known) {
    CHECK(RandomBits(key, one.index)(0) == one.bits);
    CHECK(random_bits(key, one.index) == one.bits);
  }
}

// The bits do not depend on the first element of the sequence.
void test_bits_of_consecutive_elements() {
  std::mt19937_64 random(0);
  for (const uint64_t first :
       {uint64_t{0}, uint64_t{128}, (uint64_t{1} << 32) - 1024, (uint64_t{1} << 32) - 1000,
        (uint64_t{2} << 32) - 1, (uint64_t{7} << 32) + 8192, uint64_t{1} << 50}) {
    const uint64_t key = random();
    const RandomBits bits(key, first);
    for (uint32_t i = 0; i < 1024; ++i) {
      CHECK(bits(i) == random_bits(key, first + i));
      CHECK(bits(i) == RandomBits(key, first + i)(0));
    }
  }
}

// Each bit is set half of the time, for different elements, positions and steps.
void test_bits_are_even() {
  constexpr int kCount = 1 << 16;
  for (int dimension = 0; dimension < 3; ++dimension) {
    int num_set[32] = {};
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint64_t key = rounding_key(42, dimension == 1 ? i : 0, dimension == 2 ? i : 1);
      const uint32_t bits = RandomBits(key, dimension == 0 ? i : 0)(0);
      for (int b = 0; b < 32; ++b) num_set[b] += static_cast<int>(bits >> b & 1u);
    }
    const double deviation = std::sqrt(kCount / 4.0);
    for (const int count : num_set) CHECK(std::abs(count - kCount / 2) < 5 * deviation);
  }
}

template <class Stored>
double rounded_up_or_down(float x, uint32_t random) {
  return widen(RoundStochastically<Stored>::from(x, random));
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Including infinities and NaN.
template <class Stored>
void check_exact_values_stay() {
  std::mt19937 random(0);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = widen(Stored{static_cast<uint16_t>(bits)});
    for (const uint32_t choice : {0u, ~0u, static_cast<uint32_t>(random())}) {
      const uint16_t result = RoundStochastically<Stored>::from(value, choice).bits;
      CHECK(std::isnan(value) ? std::isnan(widen(Stored{result})) : result == bits);
    }
  }
  // NaNs whose high 16 bits are those of an infinity.
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    CHECK(std::isnan(rounded_up_or_down<Stored>(bit_cast<float>(bits), ~0u)));
  }
}

template <class Stored>
void check_choice(float x, uint32_t random, const Format& format) {
  const double result = rounded_up_or_down<Stored>(x, random);
  CHECK(same(result, rounded_stochastically(x, random, format)));
  if (!std::isfinite(x)) return;
  const int last_place = format.last_place(x);
  const double to_zero = std::ldexp(std::trunc(std::ldexp(x, -last_place)), last_place);
  const double from_zero = to_zero + std::copysign(std::ldexp(1.0, last_place), x);
  if (std::abs(to_zero) > format.largest()) {
    CHECK(std::isinf(result));
  } else if (std::abs(from_zero) > format.largest()) {
    CHECK(result == to_zero || std::isinf(result));
  } else {
    CHECK(result == to_zero || result == from_zero);
  }
}

template <class Stored>
void check_choices(const Format& format) {
  std::mt19937_64 random(0);
  const auto check = [&](float x) {
    for (const uint32_t choice : {0u, ~0u, static_cast<uint32_t>(random())}) {
      check_choice<Stored>(x, choice, format);
      check_choice<Stored>(-x, choice, format);
    }
  };
  for (int round = 0; round < 200000; ++round) {
    // All magnitudes, and those near the type's subnormal numbers.
    check(bit_cast<float>(static_cast<uint32_t>(random())));
    const double below_one = std::ldexp(static_cast<double>(random() >> 11), -53);
    check(static_cast<float>(std::ldexp(below_one, format.min_exponent + 1)));
  }
  const double smallest = std::ldexp(1.0, format.min_exponent);
  const double lowest = std::ldexp(smallest, -format.mantissa_bits);
  const double beyond = std::ldexp(1.0, format.max_exponent + 1);  // of a float: infinity
  for (const double edge : {0.0, lowest, smallest, 1.0, format.largest(), beyond}) {
    const auto x = static_cast<float>(edge);
    check(x);
    check(std::nextafter(x, 0.0F));
    check(std::nextafter(x, HUGE_VALF));
  }
  check(std::numeric_limits<float>::denorm_min());
  check(std::numeric_limits<float>::max());
}

// For uniformly distributed random bits, the mean is exact.
template <class Stored>
void check_chances(const Format& format) {
  const int lowest = format.min_exponent - format.mantissa_bits;
  for (const double base : {1.0, 1.9921875, std::ldexp(1.0, format.min_exponent),
                            std::ldexp(3.0, lowest), 0.0, std::ldexp(1.0, format.max_exponent)}) {
    const int place = format.last_place(base);
    for (const int fraction : {1, 8, 1000, 4096, 8184}) {  // of 2^13
      const auto x = static_cast<float>(base + std::ldexp(fraction, place - 13));
      int num_up = 0;
      for (uint32_t choice = 0; choice < 0x10000; ++choice) {
        const double result = rounded_up_or_down<Stored>(x, choice << 16);
        CHECK(result == base || result == base + std::ldexp(1.0, place));
        num_up += result != base;
      }
      CHECK(num_up == fraction * 8);
    }
  }
}

// The mean is also right for the elements' actual random bits.
template <class Stored>
void check_mean(const Format& format) {
  constexpr uint32_t kCount = 200000;
  const int lowest = format.min_exponent - format.mantissa_bits;
  const RandomBits random(rounding_key(1, 2, 3), 0);
  for (const double base : {1.0, std::ldexp(5.0, lowest)}) {
    for (const double sign : {1.0, -1.0}) {
      for (const double fraction : {1.0 / 1024, 0.25, 0.5, 0.875}) {
        const int place = format.last_place(base);
        const auto x = static_cast<float>(sign * (base + std::ldexp(fraction, place)));
        double sum = 0.0;
        for (uint32_t i = 0; i < kCount; ++i) {
          sum += std::ldexp(rounded_up_or_down<Stored>(x, random(i)) - x, -place);
        }
        CHECK(std::abs(sum / kCount) < 5 * std::sqrt(fraction * (1 - fraction) / kCount));
      }
    }
  }
}

template <class Stored>
void check_format(const Format& format) {
  check_exact_values_stay<Stored>();
  check_choices<Stored>(format);
  check_chances<Stored>(format);
  check_mean<Stored>(format);
}

}  // namespace

int main() {
  test_known_bits();
  test_bits_of_consecutive_elements();
  test_bits_are_even();
  check_format<Float16>(kHalf);
  check_format<BFloat16>(kBrain);
}
