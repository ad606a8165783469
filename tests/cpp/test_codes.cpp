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

template <class Format>
uint8_t encode_byte(float x, float reciprocal_of_scale, uint32_t noise) {
  const uint32_t code = Format::encode(x, reciprocal_of_scale, noise);
  CHECK(code < 256);
  return static_cast<uint8_t>(code);
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
uint32_t scale_of_group(const std::vector<float>& numbers) {
  int32_t largest = Format::kLowestRank;
  for (const float x : numbers) largest = std::max(largest, Format::rank_of(x));
  return Format::scale_for(largest);
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

// Codes and scales from the start of a buffer of the right size, so that AddressSanitizer reports
// what is written beyond.
struct Coded {
  std::vector<uint8_t> codes, scales;
  explicit Coded(int64_t numel)
      : codes(static_cast<size_t>(numel), 0xa5),
        scales(static_cast<size_t>(num_groups(numel)), 0xa5) {}
};

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

// A row some of whose states are codes, and the same one with float32 states that the test encodes.
template <class Rule>
struct CodedRow {
  static constexpr int kOperands = kNumOperandsOf<Rule, ApplyUpdate>;
  static constexpr int kStates = kNumStates<Rule>;

  std::vector<Buffer> operands;  // of a state that is coded: its expected numbers
  std::vector<Coded> coded;      // for each state
  std::vector<bool> is_coded, is_signed;
  RowExtras extras{};

  static std::vector<Buffer> random_operands(int64_t numel, std::mt19937_64& random) {
    std::vector<Buffer> all;
    const bool is_uniform = random() % 2 == 0;
    const DType type = kTypes[random() % 4];
    for (size_t k = random_num_operands<Rule, ApplyUpdate>(random); k > 0; --k) {
      all.emplace_back(is_uniform ? type : kTypes[random() % 4], numel, random() % 5, random);
    }
    if (all.size() == num_with_master<Rule, ApplyUpdate>() && random() % 3 == 0) split(all, random);
    return all;
  }

  CodedRow(int64_t numel, std::mt19937_64& random) : operands(random_operands(numel, random)) {
    for (size_t s = 0; s < kStates; ++s) {
      coded.emplace_back(numel);
      is_coded.push_back(random() % 4 != 0);
      is_signed.push_back(std::strstr(Rule::kStates[s], "sq") == nullptr);
      if (is_coded[s]) operands[kFirstState + s] = Buffer(DType::kFloat32, numel, 0, random);
    }
    make_variance_positive<Rule>(operands);
    for (size_t s = 0; s < kStates; ++s) {
      if (!is_coded[s]) continue;
      encode(s, {9, 0, 0, 0}, 9);
      decode(s);
    }
  }

  // Codes of a state's expected numbers.
  void encode(size_t s, const StatePlace& place, uint64_t step) {
    is_signed[s] ? encode_as<E4M3>(s, place, step) : encode_as<UE5M3>(s, place, step);
  }
  template <class Format>
  void encode_as(size_t s, const StatePlace& place, uint64_t step) {
    const Buffer& values = operands[kFirstState + s];
    const uint64_t key = rounding_key(s / 2, place.position, step);
    for (int64_t begin = 0; begin < values.numel(); begin += kGroup) {
      std::vector<float> group;
      for (int64_t i = begin; i < std::min(begin + kGroup, values.numel()); ++i) {
        group.push_back(static_cast<float>(values.get(i)));
      }
      const uint32_t scale = scale_of_group<Format>(group);
      coded[s].scales[static_cast<size_t>(begin / kGroup)] = static_cast<uint8_t>(scale);
      for (size_t i = 0; i < group.size(); ++i) {
        const size_t at = static_cast<size_t>(begin) + i;
        uint64_t index = at;
        if (place.width != 0) {
          const auto width = static_cast<uint64_t>(place.width);
          index = at / width * static_cast<uint64_t>(place.stride) + at % width;
        }
        const uint32_t bits = state_bits(key, place.first_index + index);
        const uint32_t half = s % 2 == 0 ? bits % 65536 : bits / 65536;
        const float reciprocal = reciprocal_of_scale(scale);
        coded[s].codes[at] = encode_byte<Format>(group[i], reciprocal, half * 16 + 8);
      }
    }
  }
  void decode(size_t s) {
    for (size_t i = 0; i < coded[s].codes.size(); ++i) {
      const uint8_t code = coded[s].codes[i];
      const float scale = scale_of(coded[s].scales[i / kGroup]);
      const float value = is_signed[s] ? E4M3::decode(code, scale) : UE5M3::decode(code, scale);
      operands[kFirstState + s].put(static_cast<int64_t>(i), value);
    }
  }

  Row<kOperands> row(double scale) { return row_of<kOperands>(operands, scale); }
  // The row that the engine sweeps.
  Row<kOperands> coded_row(double scale) {
    auto result = row(scale);
    for (size_t s = 0; s < kStates; ++s) {
      if (!is_coded[s]) continue;
      result.data[kFirstState + s] = coded[s].codes.data();
      result.dtype[kFirstState + s] = is_signed[s] ? DType::kE4M3 : DType::kUE5M3;
      extras.scales[s] = coded[s].scales.data();
      result.extras = &extras;
    }
    return result;
  }
};

template <class Rule>
void check_coded_sweep(const Rule& rule, cpu::Isa isa, std::mt19937_64& random) {
  constexpr int kStates = kNumStates<Rule>;
  if constexpr (kStates > 0) {
    const auto epilogue = random_epilogue<ApplyUpdate>(random);
    std::vector<CodedRow<Rule>> rows, expected;
    for (const int64_t numel : {0, 1, 32, 33, 100, 128, 129, 320, 1000}) {
      rows.emplace_back(numel, random);
    }
    expected = rows;
    Table<CodedRow<Rule>::kOperands> table;
    for (size_t r = 0; r < rows.size(); ++r) {
      const double scale = r % 2 == 0 ? 1.0 : 0.3;
      auto row = rows[r].coded_row(scale);
      row.position = 3 * r;  // of the weight's bits
      row.first_index = 5 * r;
      StatePlace& place = rows[r].extras.place;
      place.position = r % 3 == 0 ? uint64_t{r} << 32 | 5 : 7 * r;
      place.first_index = r == 0 ? 0 : (uint64_t{r} << 32) - 1 - 50 * (r - 1);
      if (random() % 2 == 0) {
        place.width = kGroup << random() % 4;
        place.stride = place.width + kGroup * static_cast<int64_t>(random() % 9);
      }
      table.append(row);
      auto plain = expected[r].row(scale);
      plain.position = row.position;
      plain.first_index = row.first_index;
      plain.compute = row.compute;
      apply_by_hand(rule, 3, epilogue, plain, expected[r].operands);
      for (size_t s = 0; s < kStates; ++s) {
        if (rows[r].is_coded[s]) expected[r].encode(s, place, 3);
      }
    }
    std::vector<int64_t> cuts{0, table.numel};
    for (uint64_t extra = random() % 4; extra > 0; --extra) {
      cuts.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(table.numel)));
    }
    std::sort(cuts.begin(), cuts.end());
    const cpu::Setup<ApplyUpdate> setup(instance_of(rule), 3, epilogue, isa, table.any_float64);
    for (size_t share = 0; share + 1 < cuts.size(); ++share) {
      cpu::sweep_between<kStates>(setup, table, place_of(table, cuts[share], cpu::kTile),
                                  place_of(table, cuts[share + 1], cpu::kTile));
    }
    for (size_t r = 0; r < rows.size(); ++r) {
      for (size_t s = 0; s < kStates; ++s) {
        if (!rows[r].is_coded[s]) continue;
        CHECK(rows[r].coded[s].codes == expected[r].coded[s].codes);
        CHECK(rows[r].coded[s].scales == expected[r].coded[s].scales);
        rows[r].operands[kFirstState + s] = expected[r].operands[kFirstState + s];
      }
      for (size_t k = 0; k < rows[r].operands.size(); ++k) {
        CHECK(rows[r].operands[k].bytes == expected[r].operands[k].bytes);
      }
    }
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
