// 8-bit codes: the functions of codes.h against the definition, the loops of each instruction set
// against these functions, and sweeps of rows whose states are codes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cases.h"
#include "check.h"
#include "coded_rows.h"
#include "engine/codes.h"
#include "engine/cpu/conversions.h"
#include "engine/cpu/driver.h"

using namespace emopt;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class Format>
constexpr int kBiasOf = Format::kSign != 0 ? 7 : 15;

template <class Format>
bool is_nan_code(uint8_t code) {
  return (code & ~Format::kSign) == Format::kNaN;
}

// ---- the definition -----------------------------------------------------------------------------

template <class Format>
double by_definition(uint32_t code) {
  const uint32_t magnitude = code & ~Format::kSign;
  if (magnitude == Format::kNaN) return std::nan("");
  const int exponent = std::max(static_cast<int>(magnitude >> 3), 1) - kBiasOf<Format>;
  const double mantissa = magnitude % 8 / 8.0 + (magnitude >= 8 ? 1.0 : 0.0);
  return std::copysign(std::ldexp(mantissa, exponent), code & Format::kSign ? -1.0 : 1.0);
}

template <class Format>
void check_decode() {
  for (uint32_t scale = 0; scale < 248; ++scale) {
    CHECK(scale_of(static_cast<uint8_t>(scale)) ==
          (scale == 0 ? 0.0 : std::ldexp(1.0, static_cast<int>(scale) - 127)));
    if (scale != 0) {
      CHECK(reciprocal_of_scale(scale) * scale_of(static_cast<uint8_t>(scale)) == 1.0F);
    }
    for (uint32_t code = 0; code < 256; ++code) {
      const float got = Format::decode(static_cast<uint8_t>(code), scale_of(scale & 0xff));
      const double wanted = by_definition<Format>(code);
      const auto scaled = static_cast<float>(
          scale == 0 ? 0.0 * wanted : std::ldexp(wanted, static_cast<int>(scale) - 127));
      CHECK(std::isnan(wanted) ? std::isnan(got)
                               : got == scaled && std::signbit(got) == std::signbit(wanted));
    }
  }
}

// The code of one number; of its magnitude, 20 bits below the code's last one count.
template <class Format>
uint32_t encoded_by_definition(float x, uint32_t scale, uint32_t noise) {
  const bool is_signed = Format::kSign != 0;
  const uint32_t sign = is_signed && std::signbit(x) ? Format::kSign : 0;
  if (!std::isfinite(x) || (!is_signed && x < 0)) return Format::kNaN | sign;
  const double scaled = std::ldexp(std::abs(static_cast<double>(x)), 127 - static_cast<int>(scale));
  const int exponent =
      scaled == 0.0 ? 1 - kBiasOf<Format> : std::max(std::ilogb(scaled), 1 - kBiasOf<Format>);
  // The code of the exponent's smallest number, minus that of a mantissa of 1.
  const double first = 8.0 * (exponent + kBiasOf<Format> - 1);
  const double place = first + std::nearbyint(std::ldexp(scaled, 23 - exponent)) / (1 << 20);
  const double code = std::floor(place + noise / static_cast<double>(1 << 20));
  const auto finite = static_cast<uint32_t>(std::min(code, static_cast<double>(Format::kNaN)));
  return !is_signed && finite == 0 && x != 0.0F ? 1 : finite | sign;
}

// Numbers of all kinds.
float any_number(std::mt19937_64& random) {
  static const float kSpecials[] = {0.0F,
                                    -0.0F,
                                    1.0F,
                                    1.75F,
                                    1.875F,
                                    448.0F,
                                    std::nextafter(448.0F, kInf),
                                    114688.0F,
                                    1e-45F,
                                    1e-40F,
                                    1e-38F,
                                    3.4028235e38F,
                                    kInf,
                                    -kInf,
                                    std::nanf(""),
                                    -3.4028235e38F};
  const uint64_t kind = random() % 8;
  if (kind == 0) return kSpecials[random() % 16];
  if (kind == 1) return bit_cast<float>(static_cast<uint32_t>(random()));
  const float small = static_cast<float>(random() % 200001) / 100000.0F - 1.0F;
  return kind == 2 ? std::ldexp(small, -static_cast<int>(random() % 40)) : small;
}

uint32_t any_noise(std::mt19937_64& random) {
  return code_noise(static_cast<int>(random() % 2), random() % 4 == 0
                                                        ? (random() % 2 ? ~0U : 0U)
                                                        : static_cast<uint32_t>(random()));
}

template <class Format>
void check_scale(const std::vector<float>& numbers, uint32_t scale) {
  double largest = 0.0;
  for (const float x : numbers) {
    if (std::isfinite(x) && (Format::kSign != 0 || x > 0)) {
      largest = std::max(largest, std::abs(static_cast<double>(x)));
    }
  }
  const double limit = by_definition<Format>(Format::kNaN - 1);
  CHECK(scale >= 1 && scale < 248);
  CHECK(largest <= std::ldexp(limit, static_cast<int>(scale) - 127));
  CHECK(scale == 1 || largest > std::ldexp(limit, static_cast<int>(scale) - 128));
}

template <class Format>
void check_encode() {
  std::mt19937_64 random(0);
  for (int round = 0; round < 20000; ++round) {
    std::vector<float> numbers(1 + random() % 32);
    for (float& x : numbers) x = any_number(random);
    const uint32_t scale = scale_of_group<Format>(numbers);
    check_scale<Format>(numbers, scale);
    for (const float x : numbers) {
      const uint32_t noise = any_noise(random);
      const uint8_t code = encode_byte<Format>(x, reciprocal_of_scale(scale), noise);
      const uint32_t wanted = encoded_by_definition<Format>(x, scale, noise);
      // The sign of a NaN is not defined.
      CHECK(std::isnan(x) ? is_nan_code<Format>(code) : code == wanted);
      CHECK(is_nan_code<Format>(code) == (!std::isfinite(x) || (Format::kSign == 0 && x < 0)));
    }
  }
}

// A number that has a code keeps it.
template <class Format>
void check_codes_stay() {
  for (uint32_t scale = 1; scale < 248; ++scale) {
    for (uint32_t code = 0; code < 256; ++code) {
      const float x = Format::decode(static_cast<uint8_t>(code), scale_of(scale & 0xff));
      if (std::isinf(x)) continue;  // beyond float32
      for (const uint32_t random : {0U, ~0U, 0x7fff8000U}) {
        const uint32_t noise = code_noise(0, random);
        const uint8_t again = encode_byte<Format>(x, reciprocal_of_scale(scale), noise);
        CHECK(std::isnan(x) ? is_nan_code<Format>(again) : again == code);
      }
    }
  }
}

// ---- the loops ----------------------------------------------------------------------------------

template <class Format, class Real>
void check_loops(cpu::Isa isa, DType dtype) {
  const cpu::Conversions<Real>& convert = cpu::conversions<Real>(isa);
  std::mt19937_64 random(0);
  static_assert(cpu::kTile == 128);
  std::vector<int64_t> lengths;  // at most a tile
  for (int64_t n = 1; n <= 2 * kGroup + 1; ++n) lengths.push_back(n);
  for (const int64_t n : {95, 96, 97, 127, 128}) lengths.push_back(n);
  for (const int64_t n : lengths) {
    for (const int64_t offset : {int64_t{0}, kGroup, 3 * kGroup}) {
      const auto count = static_cast<size_t>(n);
      for (int state = 0; state < 4; ++state) {
        Coded coded(offset + n);
        // At an odd place, as a vector's elements and as the engine's buffers.
        const size_t shift = random() % 3;
        std::vector<Real> from(count + shift);
        for (Real& x : from) {
          x = static_cast<Real>(any_number(random));
          if (sizeof(Real) == 8 && random() % 4 == 0) x *= static_cast<Real>(1.0000000123);
        }
        std::vector<uint32_t> noise(count + shift);
        for (uint32_t& bits : noise) bits = static_cast<uint32_t>(random());
        convert.encode(dtype, coded.codes.data(), coded.scales.data(), offset, from.data() + shift,
                       n, noise.data() + shift, state);
        for (int64_t i = 0; i < offset; ++i) CHECK(coded.codes[static_cast<size_t>(i)] == 0xa5);
        for (int64_t g = 0; g < offset / kGroup; ++g) {
          CHECK(coded.scales[static_cast<size_t>(g)] == 0xa5);
        }
        for (int64_t begin = 0; begin < n; begin += kGroup) {
          std::vector<float> group;
          for (int64_t i = begin; i < std::min(begin + kGroup, n); ++i) {
            group.push_back(static_cast<float>(from[shift + static_cast<size_t>(i)]));
          }
          const uint32_t scale = scale_of_group<Format>(group);
          CHECK(coded.scales[static_cast<size_t>((offset + begin) / kGroup)] == scale);
          for (size_t i = 0; i < group.size(); ++i) {
            const size_t at = static_cast<size_t>(begin) + i;
            const uint8_t wanted = encode_byte<Format>(group[i], reciprocal_of_scale(scale),
                                                       code_noise(state, noise[shift + at]));
            const uint8_t got = coded.codes[static_cast<size_t>(offset) + at];
            CHECK(got == wanted || (is_nan_code<Format>(got) && is_nan_code<Format>(wanted)));
          }
        }
      }
      Coded coded(offset + n);
      for (uint8_t& code : coded.codes) code = static_cast<uint8_t>(random());
      for (uint8_t& scale : coded.scales) scale = static_cast<uint8_t>(random() % 248);
      std::vector<Real> to(count);
      convert.decode(to.data(), dtype, coded.codes.data(), coded.scales.data(), offset, n);
      for (size_t i = 0; i < count; ++i) {
        const size_t at = static_cast<size_t>(offset) + i;
        const float wanted = Format::decode(coded.codes[at], scale_of(coded.scales[at / kGroup]));
        CHECK(std::isnan(wanted) ? std::isnan(to[i])
                                 : to[i] == static_cast<Real>(wanted) &&
                                       std::signbit(to[i]) == std::signbit(wanted));
      }
    }
  }
}

void check_fill_random(cpu::Isa isa) {
  for (const uint64_t index : {uint64_t{0}, uint64_t{4096}, (uint64_t{1} << 32) - 50}) {
    const uint64_t key = rounding_key(1, 5, 17);
    for (const int64_t n : {1, 31, 32, 100, 128}) {
      std::vector<uint32_t> bits(static_cast<size_t>(n));
      cpu::conversions<float>(isa).fill_random(bits.data(), key, index, n);
      for (size_t i = 0; i < bits.size(); ++i) CHECK(bits[i] == state_bits(key, index + i));
    }
  }
}

// ---- sweeps -------------------------------------------------------------------------------------

template <class Rule>
void check_coded_sweep(const Rule& rule, cpu::Isa isa, std::mt19937_64& random) {
  if constexpr (kMayHaveCodes<Rule>) {
    const auto epilogue = random_epilogue<ApplyUpdate>(random);
    CodedRows<Rule> rows;
    size_t r = 0;
    for (const int64_t numel : {0, 1, 32, 33, 100, 128, 129, 320, 1000}) {
      // The high 32 bits of an index change at the first element, at a later one, or not at all.
      const uint64_t first_index = r == 0 ? 0 : (uint64_t{r} << 32) - 1 - 50 * (r - 1);
      rows.add(CodedRow<Rule>(numel, kTypes, 4, random),
               rows.random_place(r++, first_index, random), rule, 3, epilogue);
    }
    const auto& table = rows.table;
    std::vector<int64_t> cuts{0, table.numel};
    for (uint64_t extra = random() % 4; extra > 0; --extra) {
      cuts.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(table.numel)));
    }
    std::sort(cuts.begin(), cuts.end());
    const cpu::Setup<ApplyUpdate> setup(instance_of(rule), 3, epilogue, isa, table.any_float64);
    for (size_t share = 0; share + 1 < cuts.size(); ++share) {
      cpu::sweep_between<kNumStates<Rule>>(setup, table, place_of(table, cuts[share], cpu::kTile),
                                           place_of(table, cuts[share + 1], cpu::kTile));
    }
    rows.check();
  }
}

template <class Format>
void check_format(DType dtype) {
  check_decode<Format>();
  check_encode<Format>();
  check_codes_stay<Format>();
  for (const cpu::Isa isa : cpu::supported_isas()) {
    check_loops<Format, float>(isa, dtype);
    check_loops<Format, double>(isa, dtype);
  }
}

}  // namespace

int main() {
  check_format<E4M3>(DType::kE4M3);
  check_format<UE5M3>(DType::kUE5M3);
  for (const cpu::Isa isa : cpu::supported_isas()) {
    std::printf("%s\n", cpu::name(isa));
    check_fill_random(isa);
    std::mt19937_64 random(0);
    for_each_rule([&](const auto& rule) {
      for (int round = 0; round < 30; ++round) check_coded_sweep(rule, isa, random);
    });
  }
}
