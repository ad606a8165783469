// Rows whose states are stored as 8-bit codes, for the tests of both engines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <random>
#include <utility>
#include <vector>

#include "cases.h"
#include "check.h"
#include "engine/codes.h"

template <class Format>
uint8_t encode_byte(float x, float reciprocal_of_scale, uint32_t noise) {
  const uint32_t code = Format::encode(x, reciprocal_of_scale, noise);
  CHECK(code < 256);
  return static_cast<uint8_t>(code);
}

template <class Format>
uint32_t scale_of_group(const std::vector<float>& numbers) {
  int32_t largest = Format::kLowestRank;
  for (const float x : numbers) largest = std::max(largest, Format::rank_of(x));
  return Format::scale_for(largest);
}

// Codes and scales at the end of a buffer, so that AddressSanitizer reports what is written beyond.
struct Coded {
  std::vector<uint8_t> codes, scales;
  size_t before;  // codes of others
  explicit Coded(int64_t numel, size_t before_ = 0)
      : codes(static_cast<size_t>(numel) + before_, 0xa5),
        scales(static_cast<size_t>(emopt::num_groups(numel)), 0xa5),
        before(before_) {}
};

// A row some of whose states are codes, and the same one with float32 states that the test encodes.
template <class Rule>
struct CodedRow {
  static constexpr int kOperands = kNumOperandsOf<Rule, emopt::ApplyUpdate>;
  static constexpr int kStates = emopt::kNumStates<Rule>;
  static_assert(emopt::kMayHaveCodes<Rule>);

  std::vector<Buffer> operands;  // of a state that is coded: its expected numbers
  std::vector<Coded> coded;      // for each state
  std::vector<bool> is_coded;
  emopt::RowExtras extras{};

  // `types`: of operands that are not coded. Each of them starts at the first element of a buffer,
  // or behind up to `most_before` elements.
  template <size_t kCount>
  CodedRow(int64_t numel, const emopt::DType (&types)[kCount], size_t most_before,
           std::mt19937_64& random) {
    const bool is_uniform = random() % 2 == 0;
    const emopt::DType type = one_of(types, random);
    const auto before = [&] { return random() % (most_before + 1); };
    for (size_t k = random_num_operands<Rule, emopt::ApplyUpdate>(random); k > 0; --k) {
      operands.emplace_back(is_uniform ? type : one_of(types, random), numel, before(), random);
    }
    const bool has_master = operands.size() == num_with_master<Rule, emopt::ApplyUpdate>();
    if (has_master && random() % 3 == 0) split(operands, random);
    for (size_t s = 0; s < kStates; ++s) {
      coded.emplace_back(numel, before());
      is_coded.push_back(code_of(s) != emopt::StateCode::kNone && random() % 4 != 0);
      if (!is_coded[s]) continue;
      operands[emopt::kFirstState + s] = Buffer(emopt::DType::kFloat32, numel, 0, random);
    }
    make_variance_positive<Rule>(operands);
    for (size_t s = 0; s < kStates; ++s) {
      if (!is_coded[s]) continue;
      encode(s, {9, 0, 0, 0}, 9);
      decode(s);
    }
  }

  static emopt::StateCode code_of(size_t s) { return Rule::kStateCodes[s]; }
  static bool is_signed(size_t s) { return code_of(s) == emopt::StateCode::kSigned; }

  // Codes of a state's expected numbers.
  void encode(size_t s, const emopt::StatePlace& place, uint64_t step) {
    is_signed(s) ? encode_as<emopt::E4M3>(s, place, step) : encode_as<emopt::UE5M3>(s, place, step);
  }
  template <class Format>
  void encode_as(size_t s, const emopt::StatePlace& place, uint64_t step) {
    const Buffer& values = operands[emopt::kFirstState + s];
    const uint64_t key = emopt::rounding_key(s / 2, place.position, step);
    for (int64_t begin = 0; begin < values.numel(); begin += emopt::kGroup) {
      std::vector<float> group;
      for (int64_t i = begin; i < std::min(begin + emopt::kGroup, values.numel()); ++i) {
        group.push_back(static_cast<float>(values.get(i)));
      }
      const uint32_t scale = scale_of_group<Format>(group);
      coded[s].scales[static_cast<size_t>(begin / emopt::kGroup)] = static_cast<uint8_t>(scale);
      for (size_t i = 0; i < group.size(); ++i) {
        const size_t at = static_cast<size_t>(begin) + i;
        uint64_t index = at;
        if (place.width != 0) {
          const auto width = static_cast<uint64_t>(place.width);
          index = at / width * static_cast<uint64_t>(place.stride) + at % width;
        }
        const uint32_t bits = state_bits(key, place.first_index + index);
        const uint32_t half = s % 2 == 0 ? bits % 65536 : bits / 65536;
        const float reciprocal = emopt::reciprocal_of_scale(scale);
        coded[s].codes[coded[s].before + at] =
            encode_byte<Format>(group[i], reciprocal, half * 16 + 8);
      }
    }
  }
  void decode(size_t s) {
    for (int64_t i = 0; i < operands[0].numel(); ++i) {
      const auto at = static_cast<size_t>(i);
      const uint8_t code = coded[s].codes[coded[s].before + at];
      const float scale = emopt::scale_of(coded[s].scales[at / emopt::kGroup]);
      operands[emopt::kFirstState + s].put(
          i, is_signed(s) ? emopt::E4M3::decode(code, scale) : emopt::UE5M3::decode(code, scale));
    }
  }

  emopt::Row<kOperands> row(double scale) { return row_of<kOperands>(operands, scale); }
  // The row that the engine sweeps.
  emopt::Row<kOperands> coded_row(double scale) {
    auto result = row(scale);
    for (size_t s = 0; s < kStates; ++s) {
      if (!is_coded[s]) continue;
      result.data[emopt::kFirstState + s] = coded[s].codes.data() + coded[s].before;
      result.dtype[emopt::kFirstState + s] =
          is_signed(s) ? emopt::DType::kE4M3 : emopt::DType::kUE5M3;
      extras.scales[s] = coded[s].scales.data();
      result.extras = &extras;
    }
    return result;
  }
};

// Such rows, and what a step makes of them.
template <class Rule>
struct CodedRows {
  emopt::Table<CodedRow<Rule>::kOperands> table;
  std::deque<CodedRow<Rule>> rows, expected;

  // Adds a row whose step is `step`.
  void add(const CodedRow<Rule>& added, emopt::StatePlace place, const Rule& rule, double step,
           const emopt::ApplyUpdate& epilogue, int8_t device = emopt::kHost,
           float* counter = nullptr) {
    const size_t r = rows.size();
    const double scale = r % 2 == 0 ? 1.0 : 0.3;
    rows.push_back(added);
    expected.push_back(added);
    rows[r].extras.place = place;
    auto row = rows[r].coded_row(scale);
    row.device = device;
    row.step = counter;
    row.position = 3 * r;  // of the weight's bits
    row.first_index = 5 * r;
    table.append(row);
    auto plain = expected[r].row(scale);
    plain.position = row.position;
    plain.first_index = row.first_index;
    plain.compute = row.compute;
    if (epilogue.found_inf.value != 0.0) return;
    apply_by_hand(rule, step, epilogue, plain, expected[r].operands);
    for (size_t s = 0; s < rows[r].is_coded.size(); ++s) {
      if (rows[r].is_coded[s]) expected[r].encode(s, place, static_cast<uint64_t>(step));
    }
  }

  // A row's place: its first index is `first_index`.
  static emopt::StatePlace random_place(size_t r, uint64_t first_index, std::mt19937_64& random) {
    emopt::StatePlace place{r % 3 == 0 ? uint64_t{r} << 32 | 5 : 7 * r, first_index, 0, 0};
    if (random() % 2 == 0) {
      place.width = emopt::kGroup << random() % 4;
      place.stride = place.width + emopt::kGroup * static_cast<int64_t>(random() % 9);
    }
    return place;
  }

  void check() {
    for (size_t r = 0; r < rows.size(); ++r) {
      for (size_t s = 0; s < rows[r].is_coded.size(); ++s) {
        if (!rows[r].is_coded[s]) continue;
        CHECK(rows[r].coded[s].codes == expected[r].coded[s].codes);
        CHECK(rows[r].coded[s].scales == expected[r].coded[s].scales);
        rows[r].operands[emopt::kFirstState + s] = expected[r].operands[emopt::kFirstState + s];
      }
      for (size_t k = 0; k < rows[r].operands.size(); ++k) {
        CHECK(rows[r].operands[k].bytes == expected[r].operands[k].bytes);
      }
    }
  }
};
