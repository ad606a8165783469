// The CUDA kernels' code on the host, thread by thread, against a reference: every epilogue, and a
// rule for each number of states, on which the accesses depend. (The tests on emulated devices
// compare every rule with the CPU.) AddressSanitizer reports out-of-bounds accesses,
// UndefinedBehaviorSanitizer misaligned vectors. Scalars "on the device" are in the host's memory.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "buffers.h"
#include "cases.h"
#include "check.h"
#include "launches.h"
#include "plugin_rules.h"
#include "run_on_host.h"

using namespace emopt;

namespace {

// Scalars "on the device".
struct Memory {
  std::deque<float> float32;  // a deque, for stable addresses
  std::deque<double> float64;
  std::deque<int64_t> int64;

  HostOrDeviceScalar hold(double value, HostOrDeviceScalar::Type type) {
    if (type == HostOrDeviceScalar::Type::kInt64) {
      return {0.0, &int64.emplace_back(static_cast<int64_t>(value)), type};
    }
    if (type == HostOrDeviceScalar::Type::kFloat64)
      return {0.0, &float64.emplace_back(value), type};
    return {0.0, &float32.emplace_back(static_cast<float>(value)), type};
  }
};

// The epilogue with some or none of its scalars "on the device".
StoreUpdate moved(const StoreUpdate& epilogue, Memory&, std::mt19937_64&) { return epilogue; }
ApplyUpdate moved(ApplyUpdate epilogue, Memory& memory, std::mt19937_64& random) {
  uint64_t which = random() % 2 == 0 ? random() % 16 : 0;
  for (HostOrDeviceScalar* const scalar :
       {&epilogue.lr, &epilogue.grad_multiplier, &epilogue.grad_scale, &epilogue.found_inf}) {
    const auto type =
        one_of({HostOrDeviceScalar::Type::kFloat32, HostOrDeviceScalar::Type::kFloat64}, random);
    if (which % 2 != 0) *scalar = memory.hold(scalar->value, type);
    which /= 2;
  }
  return epilogue;
}

// Checks that each element is in one chunk, and that almost all elements of a row with a phase are
// accessed as vectors. Returns the number of such rows.
template <class Launch>
int64_t check_chunks(const Launch& launch, uint32_t num_blocks) {
  int64_t num_vector_rows = 0, remaining = 0;
  for (uint32_t row = 0; row < launch.num_rows; ++row) {
    num_vector_rows += launch.peel[row] != cuda::kNoPhase;
    remaining += launch.numel[row];
  }
  for (uint32_t block = 0; block < num_blocks; ++block) {
    const cuda::Chunk<Launch> chunk(launch, block);
    remaining -= chunk.length;
    const uint32_t num_singles = chunk.length - chunk.body;
    CHECK(launch.peel[chunk.row] == cuda::kNoPhase || num_singles < 2 * cuda::kHeld);
  }
  CHECK(remaining == 0);
  return num_vector_rows;
}

// Sweeps a table from the block of each row's element `first` on. Returns the number of rows that
// were accessed as vectors.
template <class Rule, class Epilogue, class Table>
int64_t sweep(const Rule& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
              const Table& table, cuda::Chip chip = {1, true}, int64_t first = 0) {
  int64_t num_vector_rows = 0;
  const auto run = [&](int8_t, const auto& launch, auto... num_blocks) {
    if constexpr (sizeof...(num_blocks) == 0) {
      run_on_host(launch);
    } else if constexpr (sizeof(launch) <= cuda::kSmallLaunch) {
      num_vector_rows += check_chunks(launch, num_blocks...);
      run_on_host(launch, num_blocks..., static_cast<uint32_t>(first / launch.chunk));
    } else {
      CHECK(!"the same code once more, for more rows than there are here");
    }
  };
  for_each_launch(rule, step, epilogue, table, chip, run);
  return num_vector_rows;
}

enum class Offsets { kNone, kEqual, kAny };

int64_t random_size(std::mt19937_64& random) {
  constexpr int64_t kHalfTile = cuda::kTile / 2, kChunk = cuda::kMaxChunk / kHalfTile;
  constexpr int64_t kHalfTiles[] = {0, 0, 0, 1, 2, 3, 4, kChunk, kChunk + 2, 2 * kChunk};
  const auto more = static_cast<int64_t>(random() % 33) - 16;
  return std::max<int64_t>(one_of(kHalfTiles, random) * kHalfTile + more, 0);
}

template <class Epilogue, class Rule>
void check(const Rule& rule, Offsets offsets, std::mt19937_64& random) {
  constexpr auto kOperands = static_cast<size_t>(kNumOperandsOf<Rule, Epilogue>);
  // A round uses one dtype, or three mixes of dtypes. Rows of the same mix share launches.
  std::vector<std::vector<DType>> mixes(3, std::vector<DType>(kOperands));
  const bool is_uniform = random() % 2 == 0;
  for (auto& mix : mixes) {
    const DType type = one_of(kTypes, random);
    for (DType& dtype : mix) dtype = is_uniform ? type : one_of(kTypes, random);
  }
  auto epilogue = random_epilogue<Epilogue>(random);
  bool is_skipped = false;
  if constexpr (Epilogue::kHasRowSteps) {
    epilogue.found_inf.value = one_of({0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -1.0}, random);
    is_skipped = epilogue.found_inf.value != 0.0;
  }
  Memory memory;
  // Some rows count their steps on the device; the others use the shared step.
  std::map<const float*, float> counters;  // and their expected values
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
    // Equal offsets in elements are different phases if a row has two dtypes.
    const bool may_be_split = !is_wide && !(offsets == Offsets::kEqual && is_uniform);
    if (count == num_with_master<Rule, Epilogue>() && may_be_split && random() % 3 == 0) {
      split(operands, random);
    }
    // The update may alias the gradient.
    const bool is_in_place = Epilogue::kOperands == 0 && mix[kUpdate] == mix[kGrad];
    if (is_in_place) operands[kUpdate] = operands[kGrad];
    float* counter = nullptr;
    double step = 3;
    if (Epilogue::kHasRowSteps && random() % 2 == 0) {
      const float done =
          one_of({0.0F, 1.0F, 19.0F, 16777216.0F}, random);  // float32 cannot count further
      counter = &memory.float32.emplace_back(done);
      step = static_cast<double>(done + 1.0F);
      counters[counter] = is_skipped ? done : done + 1.0F;
    }
    rows.add(std::move(operands), rule, step, epilogue, 0, counter);
    Row<kOperands>& row = rows.table.rows.back();
    if (is_in_place && random() % 2 == 0) row.data[kGrad] = row.data[kUpdate];
    num_filled += numel != 0;
  }
  const HostOrDeviceScalar steps[] = {{3.0},
                                      memory.hold(3, HostOrDeviceScalar::Type::kFloat32),
                                      memory.hold(3, HostOrDeviceScalar::Type::kFloat64),
                                      memory.hold(3, HostOrDeviceScalar::Type::kInt64)};
  const cuda::Chip chip{one_of({1U, 2U, 132U}, random), random() % 2 == 0};
  const int64_t num_vector_rows =
      sweep(rule, one_of(steps, random), moved(epilogue, memory, random), rows.table, chip);
  rows.check();
  for (const auto& [counter, wanted] : counters) CHECK(*counter == wanted);
  const bool has_phase = offsets == Offsets::kNone || (offsets == Offsets::kEqual && is_uniform);
  if (has_phase && !is_skipped)
    CHECK(num_vector_rows == num_filled);  // otherwise vectors were not tested
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
  const auto sweep_moved = [&](const Rule& same, double step, const ApplyUpdate& epilogue,
                               const auto& table) {
    Memory memory;
    sweep(same, {step}, moved(epilogue, memory, random), table);
  };
  for (int round = 0; round < 5; ++round) {
    check_lr_0(rule, 0, random, sweep_moved);
    if constexpr (std::is_same_v<Rule, PatientDescent>) {
      if (rule.patience < 3.0) continue;
      check_kept_weights(rule, random_epilogue<ApplyUpdate>(random), 0, random, sweep_moved);
    }
  }
}

// More counters than a block has threads.
void test_advance() {
  for (const float found_inf : {0.0F, 1.0F, -1.0F}) {
    std::vector<float> counters(cuda::Advance::kCapacity, 41.0F);
    cuda::Advance advance{{0.0, &found_inf}, cuda::kThreads + 3, {}};
    for (size_t i = 0; i < counters.size(); ++i) advance.counters[i] = &counters[i];
    run_on_host(advance);
    for (size_t i = 0; i < counters.size(); ++i) {
      CHECK(counters[i] == (i < advance.count && found_inf == 0.0F ? 42.0F : 41.0F));
    }
  }
}

// Random bits depend on all 64 bits of an index. Tests the last blocks of rows of more than 2^32
// elements, and rows in which the high 32 bits change within a chunk.
void test_long_rows() {
  constexpr int64_t kChunk = cuda::kMaxChunk;
  const auto check_row = [](int64_t numel, int64_t num_last, uint64_t first_index) {
    const LongRow row(numel, num_last, 0, first_index);
    CHECK(sweep(row.rule, {1.0}, row.epilogue, row.table, {1, true}, row.first) == 1);
    row.check();
  };
  check_row((int64_t{1} << 32) + 2 * kChunk + 5, 4 * kChunk + 5, 0);
  for (const int64_t before : {int64_t{1}, int64_t{2001}, kChunk - 3, kChunk + 5}) {
    for (const uint64_t shift : {1, 2}) {
      check_row(2 * kChunk, 2 * kChunk - 1, (shift << 32) - static_cast<uint64_t>(before));
    }
  }
}

}  // namespace

int main() {
  const auto check = [](const auto& rule) { check_rule(rule); };
  visit_rule<Signum>(check);
  visit_rule<Adam>(check);
  visit_rule<AdEMAMix>(check);
  for (const auto& rule : patient_rules()) check_rule(rule);
  test_advance();
  test_long_rows();
}
