// What the CUDA kernels do, run on the host thread by thread: every rule and epilogue against those
// applied element by element. AddressSanitizer sees each access out of bounds,
// UndefinedBehaviorSanitizer each vector that is not aligned. Where a device would read its memory,
// the host reads its own.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <iterator>
#include <random>
#include <utility>
#include <vector>

#include "buffers.h"
#include "cases.h"
#include "check.h"
#include "engine/cuda/plan.h"
#include "run_on_host.h"

using namespace emopt;

namespace {

// Numbers in the device's memory.
struct Memory {
  std::deque<float> float32;  // whose elements stay where they are
  std::deque<double> float64;
  std::deque<int64_t> int64;

  Number hold(double value, Number::Type type) {
    if (type == Number::Type::kInt64) {
      return {0.0, &int64.emplace_back(static_cast<int64_t>(value)), type};
    }
    if (type == Number::Type::kFloat64) return {0.0, &float64.emplace_back(value), type};
    return {0.0, &float32.emplace_back(static_cast<float>(value)), type};
  }
};

// What the engine does, with the memory that the device reads for itself.
struct Device {
  Memory memory;
  int64_t num_vector_rows = 0;

  template <class Rule, class Epilogue>
  void sweep(const Rule& rule, const Number& step, const Epilogue& epilogue,
             const Table<kNumOperands<Rule, Epilogue>>& table, cuda::Chip chip = {1, true}) {
    cuda::for_each_launch(
        rule, step, epilogue, table, [&](int8_t) { return chip; },
        [&](int8_t, const auto& launch, uint32_t num_blocks) {
          for (uint32_t row = 0; row < launch.num_rows; ++row) {
            num_vector_rows += launch.peel[row] != cuda::kNoPhase;
          }
          run_on_host(launch, num_blocks);
        });
    if constexpr (Epilogue::kHasRowSteps) {
      cuda::for_each_advance(table, epilogue.found_inf, [](int8_t, const cuda::Advance& counters) {
        for (uint32_t thread = 0; thread < cuda::kThreads; ++thread) {
          cuda::advance_counters(counters, thread, cuda::kThreads);
        }
      });
    }
  }

  // The epilogue with some of its numbers, or none, in memory.
  StoreUpdate moved(const StoreUpdate& epilogue, std::mt19937_64&) { return epilogue; }
  ApplyUpdate moved(ApplyUpdate epilogue, std::mt19937_64& random) {
    const uint64_t which = random() % 2 == 0 ? random() % 16 : 0;
    Number* const numbers[] = {&epilogue.lr, &epilogue.grad_multiplier, &epilogue.grad_scale,
                               &epilogue.found_inf};
    for (size_t i = 0; i < std::size(numbers); ++i) {
      const auto type = one_of({Number::Type::kFloat32, Number::Type::kFloat64}, random);
      if ((which >> i & 1) != 0) *numbers[i] = memory.hold(numbers[i]->value, type);
    }
    return epilogue;
  }
};

enum class Offsets { kNone, kEqual, kAny };

int64_t random_size(std::mt19937_64& random) {
  constexpr int64_t kChunk = cuda::kMaxChunk;
  constexpr int64_t kTile = cuda::kTile;
  const int64_t around[] = {
      0,         1, 8, 16, kTile / 2, kTile, kTile + kTile / 2, 2 * kTile, kChunk, kChunk + kTile,
      2 * kChunk};
  const int64_t size =
      around[random() % std::size(around)] + static_cast<int64_t>(random() % 33) - 16;
  return size < 0 ? 0 : size;
}

template <class Epilogue, class Rule>
void check(const Rule& rule, Offsets offsets, std::mt19937_64& random) {
  constexpr auto kOperands = static_cast<size_t>(kNumOperands<Rule, Epilogue>);
  // Half of the rounds in one type, the others in mixes, of which rows of one kind share launches.
  std::vector<std::vector<DType>> mixes(3, std::vector<DType>(kOperands));
  const bool is_uniform = random() % 2 == 0;
  for (auto& mix : mixes) {
    const DType type = one_of(kTypes, random);
    for (DType& dtype : mix) dtype = is_uniform ? type : one_of(kTypes, random);
  }
  Device device;
  auto epilogue = random_epilogue<Epilogue>(random);
  if constexpr (Epilogue::kHasRowSteps) epilogue.found_inf.value = random() % 8 == 0 ? 1.0 : 0.0;
  // Some rows count their steps on the device; the others have the one that all have in common.
  struct Counted {
    float* counter;
    double wanted;
  };
  std::vector<Counted> counters;
  Rows<Rule, Epilogue> rows;
  int64_t num_filled = 0;
  for (int r = 0; r < 4; ++r) {
    const auto& mix = mixes[random() % mixes.size()];
    const int64_t numel = random_size(random);
    const size_t shared = random() % 40;
    const size_t count = random_num_operands<Rule, Epilogue>(random);
    std::vector<Buffer> operands;
    for (size_t k = 0; k < count; ++k) {
      const size_t before = offsets == Offsets::kNone    ? 0
                            : offsets == Offsets::kEqual ? shared
                                                         : random() % 40;
      operands.emplace_back(mix[k], numel, before, random);
    }
    const bool is_wide = std::count(mix.begin() + kGrad, mix.end() - 1, DType::kFloat64) != 0;
    // With offsets that are equal in number, phases would differ.
    const bool may_halve = !is_wide && !(offsets == Offsets::kEqual && is_uniform);
    if (count == num_with_master<Rule, Epilogue>() && may_halve && random() % 3 == 0) {
      halve(operands, random);
    }
    float* counter = nullptr;
    double step = 3;
    if (Epilogue::kHasRowSteps && random() % 2 == 0) {
      step = static_cast<double>(random() % 20 + 1);
      counter = &device.memory.float32.emplace_back(static_cast<float>(step - 1));
      counters.push_back({counter, step});
    }
    rows.add(std::move(operands), rule, step, epilogue, 0, counter);
    num_filled += numel != 0;
  }
  const Number steps[] = {{3.0},
                          device.memory.hold(3, Number::Type::kFloat32),
                          device.memory.hold(3, Number::Type::kFloat64),
                          device.memory.hold(3, Number::Type::kInt64)};
  const cuda::Chip chip{one_of({1U, 2U, 132U}, random), random() % 2 == 0};
  device.sweep(rule, one_of(steps, random), device.moved(epilogue, random), rows.table, chip);
  rows.check();
  bool is_skipped = false;
  if constexpr (Epilogue::kHasRowSteps) is_skipped = epilogue.found_inf.value != 0.0;
  for (const Counted& one : counters) CHECK(*one.counter == one.wanted - (is_skipped ? 1 : 0));
  const bool has_phase = offsets == Offsets::kNone || (offsets == Offsets::kEqual && is_uniform);
  if (has_phase && !is_skipped) {
    CHECK(device.num_vector_rows == num_filled);  // else the vectors' loop was not what was tested
  }
}

template <class Rule>
void check_rule(const Rule& rule) {
  std::mt19937_64 random(0);
  for (const Offsets offsets : {Offsets::kNone, Offsets::kEqual, Offsets::kAny}) {
    for (int round = 0; round < 10; ++round) {
      check<StoreUpdate>(rule, offsets, random);
      check<ApplyUpdate>(rule, offsets, random);
    }
  }
}

// Known to the host or not.
template <class Rule>
void check_lr_0_of_rule(const Rule& rule) {
  std::mt19937_64 random(0);
  const auto sweep = [&](const Rule& same, double step, const ApplyUpdate& epilogue,
                         const auto& table) {
    Device device;
    device.sweep(same, {step}, device.moved(epilogue, random), table);
  };
  for (int round = 0; round < 5; ++round) check_lr_0(rule, 0, random, sweep);
}

// Rows without elements have no block, but count their steps.
void test_counters_of_empty_rows() {
  constexpr int kOperands = kNumOperands<Lion, ApplyUpdate>;
  for (const double found_inf : {0.0, 1.0, -1.0}) {
    for (const bool is_on_device : {false, true}) {
      Device device;
      std::vector<float> counters(2 * cuda::Advance::kCapacity + 3, 41.0F);
      Table<kOperands> table;
      for (float& counter : counters) {
        Row<kOperands> row{};
        row.device = 0;
        row.step = &counter;
        table.append(row);
      }
      ApplyUpdate epilogue;
      epilogue.found_inf =
          is_on_device ? device.memory.hold(found_inf, Number::Type::kFloat32) : Number{found_inf};
      device.sweep(Lion{0.9, 0.99}, {1.0}, epilogue, table);
      for (const float counter : counters) CHECK(counter == (found_inf != 0.0 ? 41.0F : 42.0F));
    }
  }
}

// The update may be the gradient.
void test_update_in_place_of_gradient() {
  std::mt19937_64 random(0);
  const Lion rule{0.9, 0.99};
  for (const DType dtype : kTypes) {
    for (const size_t before : {0, 1}) {
      const int64_t numel = cuda::kMaxChunk + cuda::kTile + 13;
      std::vector<Buffer> operands(3, Buffer(dtype, numel, before, random));
      std::vector<Buffer> expected = operands;
      Row<3> row = row_of<3>(operands, 1.0);
      apply_by_hand(rule, 1, StoreUpdate{}, row, expected);
      row.device = 0;
      row.data[kGrad] = row.data[kUpdate];
      Table<3> table;
      table.append(row);
      Device().sweep(rule, {1.0}, StoreUpdate{}, table);
      CHECK(operands[kUpdate].bytes == expected[kUpdate].bytes);
      CHECK(operands[kFirstState].bytes == expected[kFirstState].bytes);
    }
  }
}

// On which a block's share is large.
cuda::Chip small_chip(int8_t) { return {1, true}; }

// Chunks that start beyond 2^32 elements, of whose indices the random bits depend on both halves.
void test_beyond_two_to_the_32() {
  constexpr int64_t kChunk = cuda::kMaxChunk;
  const LongRow row((int64_t{1} << 32) + 2 * kChunk + 5, 4 * kChunk + 5, 0);
  cuda::for_each_launch(row.rule, {1.0}, row.epilogue, row.table, small_chip,
                        [&](int8_t, const auto& launch, uint32_t num_blocks) {
                          CHECK(num_blocks == cuda::ceil_div(row.numel, kChunk));
                          run_on_host(launch, num_blocks, num_blocks - 5);
                        });
  row.check();
}

// A chunk in which the high half of the indices changes, as those of a shard start anywhere.
void test_carry_within_a_chunk() {
  constexpr int64_t kChunk = cuda::kMaxChunk;
  for (const uint64_t shift : {1, 2}) {
    const uint64_t boundary = shift << 32;
    for (const int64_t before : {int64_t{1}, int64_t{2001}, kChunk - 3, kChunk + 5}) {
      const LongRow row(2 * kChunk, 2 * kChunk - 1, 0, boundary - static_cast<uint64_t>(before));
      cuda::for_each_launch(row.rule, {1.0}, row.epilogue, row.table, small_chip,
                            [&](int8_t, const auto& launch, uint32_t num_blocks) {
                              run_on_host(launch, num_blocks);
                            });
      row.check();
    }
  }
}

}  // namespace

int main() {
  for_each_rule([](const auto& rule) {
    check_rule(rule);
    check_lr_0_of_rule(rule);
  });
  test_counters_of_empty_rows();
  test_update_in_place_of_gradient();
  test_beyond_two_to_the_32();
  test_carry_within_a_chunk();
}
