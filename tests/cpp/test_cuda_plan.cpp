// Plans: each chunk of each row has one block, rows of different kinds never share a launch, there
// are few launches, and each counter and scalar state is advanced once. No operand is accessed.
#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "launches.h"
#include "plugin_rules.h"
#include "rules.h"

using namespace emopt;

namespace {

// An address that identifies operand `k` of row `r`.
void* address(size_t r, int k) {
  return reinterpret_cast<void*>((r + 1) * 4096 + 16 * static_cast<size_t>(k));
}

// An address that the host cannot read.
const HostOrDeviceScalar kOnDevice{0.0, reinterpret_cast<const void*>(16)};

constexpr cuda::Chip kChip{132, true};

// Every third row has a counter.
template <int kOperands>
Row<kOperands> row_with(size_t r, int64_t numel, DType dtype, int8_t device) {
  Row<kOperands> row{};
  row.numel = numel;
  row.device = device;
  row.scale = static_cast<double>(r);
  row.position = 10 * r + (uint64_t{r} << 32);
  row.first_index = (uint64_t{r} << 33) + 3;
  if (device != kHost && r % 3 == 0) row.step = static_cast<float*>(address(r, 128));
  row.compute = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (int k = 0; k < kOperands; ++k) {
    row.data[k] = address(r, k);
    row.dtype[k] = dtype;
  }
  return row;
}

// The scalar states of a row.
RowExtras scalars_of_row(size_t r, int count) {
  RowExtras extras{};
  for (int i = 0; i < count; ++i) extras.scalars[i] = static_cast<float*>(address(r, 129 + i));
  return extras;
}

// Gives two in three rows on devices scalar states. The pointers last as long as the result.
template <class Rule, int kOperands>
std::vector<RowExtras> add_scalars(Table<kOperands>& table) {
  std::vector<RowExtras> scalars;
  if (kNumScalarStates<Rule> == 0) return scalars;
  scalars.reserve(table.rows.size());
  for (size_t r = 0; r < table.rows.size(); ++r) {
    scalars.push_back(scalars_of_row(r, kNumScalarStates<Rule>));
    if (r % 3 != 1 && table.rows[r].device != kHost) table.rows[r].extras = &scalars[r];
  }
  return scalars;
}

template <class Rule, class Epilogue, class Real, size_t kBytes>
constexpr size_t capacity() {
  using Launch = cuda::Launch<Rule, Epilogue, Real, kBytes>;
  static_assert(std::is_trivially_copyable_v<Launch>);
  static_assert(sizeof(Launch) <= kBytes);
  constexpr size_t kUnused = sizeof(typename Launch::RowStepOf) + 40;
  static_assert(sizeof(Launch) + Launch::kRowBytes + kUnused > kBytes, "room is wasted");
  return Launch::kCapacity;
}

// The fewest launches that hold `count` rows of one kind.
template <class Rule, class Epilogue>
constexpr size_t fewest_launches(size_t count, DType dtype, bool allow_large) {
  constexpr size_t kSmall = capacity<Rule, Epilogue, float, cuda::kSmallLaunch>();
  constexpr size_t kLarge = capacity<Rule, Epilogue, float, cuda::kLargeLaunch>();
  constexpr size_t kDouble = capacity<Rule, Epilogue, double, cuda::kSmallLaunch>();
  const size_t most = dtype == DType::kFloat64        ? kDouble
                      : allow_large && count > kSmall ? kLarge
                                                      : kSmall;
  return (count + most - 1) / most;
}

template <class Rule, class Epilogue>
size_t count_launches(const Table<kNumOperandsOf<Rule, Epilogue>>& table, const cuda::Chip& chip,
                      const Epilogue& epilogue = {}) {
  size_t launches = 0;
  std::map<const void*, const Row<kNumOperandsOf<Rule, Epilogue>>*> rows;  // not yet swept
  for (const auto& row : table.rows) {
    if (row.device != kHost && row.numel != 0) rows[row.data[0]] = &row;
  }
  const auto check_launch = [&](int8_t device, const auto& launch, uint32_t num_blocks) {
    using Launch = std::decay_t<decltype(launch)>;
    constexpr size_t kSmall = capacity<Rule, Epilogue, float, cuda::kSmallLaunch>();
    const bool is_large = sizeof(Launch) > cuda::kSmallLaunch;
    CHECK(!is_large || (chip.takes_large_launches && launch.num_rows > kSmall));
    CHECK(launch.num_rows > 0 && launch.num_rows <= Launch::kCapacity);
    ++launches;
    bool needs_setup = epilogue.is_on_device();
    int64_t total = 0;
    uint32_t block = 0;
    for (uint32_t r = 0; r < launch.num_rows; ++r) {
      const auto found = rows.find(launch.data[0][r]);
      CHECK(found != rows.end());
      const auto& row = *found->second;
      rows.erase(found);
      CHECK(row.device == device && launch.numel[r] == row.numel);
      CHECK((row.compute == DType::kFloat64) == (sizeof(typename Launch::Real) == 8));
      CHECK(launch.scale[r] == static_cast<typename Launch::Real>(row.scale));
      for (int k = 0; k < Launch::kOperands; ++k) {
        CHECK(launch.data[k][r] == row.data[k] && launch.dtype[k] == row.dtype[k]);
      }
      if constexpr (Epilogue::kHasRowSteps) {
        CHECK(launch.steps[r].counter == row.step);
        CHECK(launch.steps[r].position == row.position);
        CHECK(launch.steps[r].first_index == row.first_index);
        needs_setup |= row.step != nullptr;
        needs_setup |= epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
      }
      if constexpr (kNumScalarStates<Rule> != 0) {
        const bool is_there = cuda::has_scalars<Epilogue>(row);
        CHECK(is_there == (row.scalars() != nullptr && (!Epilogue::kHasRowSteps || row.step)));
        for (int i = 0; i < kNumScalarStates<Rule>; ++i) {
          CHECK(launch.steps[r].scalars[i] == (is_there ? row.scalars()[i] : nullptr));
        }
        needs_setup |= is_there;
      }
      CHECK(launch.first_block[r] == block);
      for (int64_t at = 0; at < row.numel; at += launch.chunk) CHECK(launch.row_of(block++) == r);
      total += row.numel;
    }
    CHECK(num_blocks == block && launch.needs_setup == needs_setup);
    const int64_t at_a_time = chip.multiprocessors * Launch::num_blocks(needs_setup);
    CHECK(launch.chunk == cuda::chunk_for(total, at_a_time));
  };
  const auto check = [&](int8_t device, const auto& launch, auto... num_blocks) {
    if constexpr (sizeof...(num_blocks) != 0) check_launch(device, launch, num_blocks...);
  };
  const auto check_scalars = [](int8_t, const std::vector<RowScalars>&) {
    CHECK(kNumScalarStates<Rule> != 0 && Epilogue::kHasRowSteps);
  };
  for_each_launch(Rule{}, {1.0}, epilogue, table, chip, check, check_scalars);
  CHECK(rows.empty());
  return launches;
}

template <class Rule, class Epilogue>
void test_few_launches() {
  constexpr int kOperands = kNumOperandsOf<Rule, Epilogue>;
  constexpr size_t kSmall = capacity<Rule, Epilogue, float, cuda::kSmallLaunch>();
  const auto check = [](size_t num_rows, int64_t numel, DType dtype, bool allow_large) {
    Table<kOperands> table;
    for (size_t r = 0; r < num_rows; ++r) table.append(row_with<kOperands>(r, numel, dtype, 0));
    const auto scalars = add_scalars<Rule>(table);
    const size_t filled = numel != 0 ? num_rows : 0;
    const size_t fewest = fewest_launches<Rule, Epilogue>(filled, dtype, allow_large);
    CHECK((count_launches<Rule, Epilogue>(table, {132, allow_large}) == fewest));
  };
  for (const size_t num_rows : {size_t{0}, size_t{1}, kSmall, kSmall + 1, size_t{1000}}) {
    check(num_rows, 0, DType::kFloat32, true);
    check(num_rows, 100, DType::kFloat32, true);
    check(num_rows, 100, DType::kFloat64, true);
    check(num_rows, 3 * cuda::kMaxChunk + 1, DType::kFloat32, false);
  }
}

template <class Rule, class Epilogue>
void test_kinds_do_not_mix(const Epilogue& epilogue = {}) {
  constexpr int kOperands = kNumOperandsOf<Rule, Epilogue>;
  constexpr DType kKinds[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16};
  std::mt19937_64 random(0);
  for (int round = 0; round < 100; ++round) {
    Table<kOperands> table;
    const size_t mixed = random() % kOperands;  // the operand whose type differs
    std::map<std::pair<int, DType>, size_t> kinds;
    for (size_t r = random() % 300; r > 0; --r) {
      const auto device = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
      const DType dtype = kKinds[random() % 3];
      const auto numel = static_cast<int64_t>(random() % 4 * (cuda::kMaxChunk / 2 + random() % 3));
      const DType others = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
      auto row = row_with<kOperands>(r, numel, others, device);
      row.dtype[mixed] = dtype;
      table.append(row);
      if (device != kHost && numel != 0) ++kinds[{device, dtype}];
    }
    const auto scalars = add_scalars<Rule>(table);
    for (const bool allow_large : {true, false}) {
      size_t fewest = 0;
      for (const auto& [kind, count] : kinds) {
        fewest += fewest_launches<Rule, Epilogue>(count, kind.second, allow_large);
      }
      CHECK(count_launches<Rule>(table, {1, allow_large}, epilogue) == fewest);
    }
  }
}

// Blocks read scalars only if the host does not know them. A step that the host knows to be skipped
// has no launches.
void test_setup() {
  const auto needs_setup = [](const HostOrDeviceScalar& step, const ApplyUpdate& epilogue,
                              DType dtype) {
    Table<4> table;
    table.append(row_with<4>(1, 5, dtype, 0));
    CHECK(table.rows[0].step == nullptr);
    std::optional<bool> result;
    for_each_launch(Lion{}, step, epilogue, table, kChip,
                    [&](int8_t, const auto& launch, auto... num_blocks) {
                      if constexpr (sizeof...(num_blocks) != 0) result = launch.needs_setup;
                    });
    return result;
  };
  ApplyUpdate stochastic, skipped;
  stochastic.is_stochastic = true;
  skipped.found_inf = {1.0};
  CHECK(needs_setup({1.0}, {}, DType::kFloat32) == false);
  CHECK(needs_setup(kOnDevice, {}, DType::kFloat32) == true);
  CHECK(needs_setup({1.0}, stochastic, DType::kFloat32) == false);
  CHECK(needs_setup({1.0}, stochastic, DType::kBFloat16) == true);
  CHECK(needs_setup({1.0}, skipped, DType::kFloat32) == std::nullopt);
  for (HostOrDeviceScalar ApplyUpdate::* const member :
       {&ApplyUpdate::lr, &ApplyUpdate::grad_multiplier, &ApplyUpdate::grad_scale,
        &ApplyUpdate::found_inf}) {
    ApplyUpdate epilogue;
    epilogue.*member = kOnDevice;
    CHECK(needs_setup({1.0}, epilogue, DType::kFloat32) == true);
  }
}

// Each counter is advanced once, on its device, even for an empty row. Launches are as few as
// possible if the rows of each device are contiguous.
void test_counters() {
  constexpr size_t kCapacity = cuda::Advance::kCapacity;
  static_assert(sizeof(cuda::Advance) <= cuda::kSmallLaunch);
  static_assert(sizeof(cuda::Advance) + sizeof(float*) > cuda::kSmallLaunch, "room is wasted");
  std::mt19937_64 random(0);
  for (const size_t num_counters :
       {size_t{0}, size_t{1}, kCapacity, kCapacity + 1, 3 * kCapacity + 7}) {
    for (const bool is_mixed : {false, true}) {
      Table<3> table;
      std::map<const float*, int8_t> devices;  // of the counters not yet advanced
      for (size_t r = 0; r < 4 * 3 * num_counters; ++r) {
        const size_t number = is_mixed ? random() % 4 : r / (3 * num_counters);
        const auto device = static_cast<int8_t>(static_cast<int>(number) - 1);
        table.append(row_with<3>(r, r % 2 == 0 ? 0 : 5, DType::kFloat32, device));
        if (device != kHost && r % 3 == 0) devices[table.rows.back().step] = device;
      }
      size_t launches = 0;
      const auto check = [&](int8_t device, const cuda::Advance& advance) {
        CHECK(advance.count > 0 && advance.count <= kCapacity);
        CHECK(advance.found_inf.address == kOnDevice.address);
        for (uint32_t i = 0; i < advance.count; ++i) {
          CHECK(devices.at(advance.counters[i]) == device);
          devices.erase(advance.counters[i]);
        }
        ++launches;
      };
      cuda::for_each_advance(table, kOnDevice, check);
      CHECK(devices.empty());
      CHECK(is_mixed || launches == 3 * ((num_counters + kCapacity - 1) / kCapacity));
    }
  }
}

// A row with scalar states is advanced once, on its device, even if it is empty, and its counter
// with them. Launches are as few as possible, and stop after an error.
void test_scalar_states() {
  using Launch = cuda::AdvanceScalars<FourNumbers>;
  constexpr size_t kCapacity = Launch::kCapacity;
  static_assert(std::is_trivially_copyable_v<Launch>);
  static_assert(sizeof(Launch) <= cuda::kSmallLaunch);
  static_assert(sizeof(Launch) + sizeof(RowScalars) > cuda::kSmallLaunch, "room is wasted");
  for (const size_t num_rows : {size_t{0}, size_t{1}, 9 * kCapacity, 40 * kCapacity + 5}) {
    Table<4> table;
    for (size_t r = 0; r < num_rows; ++r) {
      const auto device = static_cast<int8_t>(static_cast<int>(r % 4) - 1);
      table.append(row_with<4>(r, r % 2 == 0 ? 0 : 5, DType::kFloat32, device));
    }
    const auto scalars = add_scalars<FourNumbers>(table);
    std::map<const float*, int8_t> devices;  // of the counters not yet advanced
    std::map<int8_t, size_t> counts;
    for (const auto& row : table.rows) {
      if (row.step == nullptr) continue;
      devices[row.step] = row.device;
      if (row.scalars() != nullptr) ++counts[row.device];
    }
    const auto check_counters = [&](int8_t device, const cuda::Advance& advance) {
      for (uint32_t i = 0; i < advance.count; ++i) {
        CHECK(devices.at(advance.counters[i]) == device);
        devices.erase(advance.counters[i]);
      }
    };
    cuda::for_each_advance(table, kOnDevice, check_counters);
    const auto check_rows = [&](int8_t device, const std::vector<RowScalars>& rows) {
      CHECK(rows.size() == counts.at(device));
      size_t launches = 0, attempts = 0;
      const auto check_launch = [&](const Launch& launch) {
        CHECK(launch.count > 0 && launch.count <= kCapacity);
        CHECK(launch.step.value == 2.0 && launch.found_inf.address == kOnDevice.address);
        CHECK(launch.rule.rate == 0.5);
        for (uint32_t i = 0; i < launch.count; ++i) {
          const RowScalars& row = launch.rows[i];
          CHECK(devices.at(row.counter) == device);
          devices.erase(row.counter);
          for (int k = 0; k < 4; ++k) {
            const char* const counter = reinterpret_cast<const char*>(row.counter);
            CHECK(reinterpret_cast<const char*>(row.scalars[k]) == counter + 16 * (k + 1));
          }
        }
        ++launches;
        return true;
      };
      const FourNumbers rule{{}, 0.5};
      cuda::plan_advance(rule, {2.0}, kOnDevice, rows.data(), rows.size(), check_launch);
      CHECK(launches == (rows.size() + kCapacity - 1) / kCapacity);
      cuda::plan_advance(rule, {2.0}, kOnDevice, rows.data(), rows.size(),
                         [&](const Launch&) { return ++attempts == 2; });
      CHECK(attempts == 1);
      counts.erase(device);
    };
    cuda::for_each_scalars(table, check_rows);
    CHECK(devices.empty() && counts.empty());
  }
}

// More blocks than a launch may have are split among launches; offsets have 64 bits.
void test_huge_rows() {
  constexpr int64_t kHalf = int64_t{1} << 30;  // two rows of it exceed the limit by one block
  Table<3> table;
  for (const int64_t blocks : {kHalf, kHalf, kHalf - 1}) {
    const int64_t numel = blocks * cuda::kMaxChunk - 5;
    table.append(row_with<3>(table.rows.size(), numel, DType::kBFloat16, 0));
  }
  std::vector<int64_t> blocks;
  for_each_launch(Lion{0.9, 0.99}, {1.0}, StoreUpdate{}, table, kChip,
                  [&](int8_t, const auto& launch, uint32_t num_blocks) {
                    blocks.push_back(num_blocks);
                    CHECK(launch.row_of(num_blocks - 1) == launch.num_rows - 1);
                    CHECK(launch.numel[0] == kHalf * cuda::kMaxChunk - 5);
                    CHECK(launch.chunk == cuda::kMaxChunk);
                  });
  CHECK(blocks == std::vector<int64_t>({kHalf, 2 * kHalf - 1}));
}

// Blocks fill their waves, as far as chunks of full tiles permit.
void test_chunks() {
  std::mt19937_64 random(0);
  for (int round = 0; round < 10000; ++round) {
    const auto total = static_cast<int64_t>((random() >> random() % 44 >> 20) + 1);
    const auto at_a_time = static_cast<int64_t>(random() % 700 + 1);
    const int64_t chunk = cuda::chunk_for(total, at_a_time);
    CHECK(chunk > 0 && chunk <= cuda::kMaxChunk && chunk % cuda::kTile == 0);
    const int64_t times = cuda::ceil_div(cuda::ceil_div(total, chunk), at_a_time);
    CHECK(times == cuda::ceil_div(total, at_a_time * cuda::kMaxChunk));
    const int64_t smaller = chunk - cuda::kTile;
    CHECK(smaller == 0 || cuda::ceil_div(total, smaller) > times * at_a_time);
  }
  CHECK(cuda::chunk_for(1, 528) == cuda::kTile);
  CHECK(cuda::chunk_for(1024 * cuda::kTile, 528) == 2 * cuda::kTile);  // 512 blocks
  CHECK(cuda::chunk_for(3 * 528 * cuda::kMaxChunk, 528) == cuda::kMaxChunk);
}

// After the peel all operands are aligned for vectors; if such a peel exists, it is found.
void test_peel() {
  std::mt19937_64 random(0);
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  for (int round = 0; round < 100000; ++round) {
    void* data[4];
    DType dtype[4];
    for (int k = 0; k < 4; ++k) {
      dtype[k] = kAll[random() % 4];
      uint64_t element = random() % 16;
      if (round % 2 != 0)
        element = element / cuda::kHeld * cuda::kHeld + 3;  // so that a peel exists
      data[k] = reinterpret_cast<void*>(4096 + element * static_cast<uint64_t>(size_of(dtype[k])));
    }
    const auto is_aligned_after = [&](uint64_t elements) {
      for (int k = 0; k < 4; ++k) {
        const auto size = static_cast<uint64_t>(size_of(dtype[k]));
        const uint64_t vector = std::min<uint64_t>(16, cuda::kHeld * size);
        if ((reinterpret_cast<uint64_t>(data[k]) + elements * size) % vector != 0) return false;
      }
      return true;
    };
    uint64_t wanted = 0;
    while (wanted < 64 && !is_aligned_after(wanted)) ++wanted;
    CHECK(cuda::peel_of(data, dtype, 4) == (wanted < 64 ? wanted : cuda::kNoPhase));
    CHECK(round % 2 == 0 || wanted < cuda::kHeld);
  }
}

}  // namespace

int main() {
  // A thousand rows of any rule take at most three launches.
#define EMOPT_TEST(Rule)                                                               \
  static_assert(fewest_launches<Rule, StoreUpdate>(1000, DType::kFloat32, true) <= 2); \
  static_assert(fewest_launches<Rule, ApplyUpdate>(1000, DType::kFloat32, true) <= 3);
  EMOPT_FOR_EACH_RULE(EMOPT_TEST)
  test_few_launches<Lion, StoreUpdate>();
  test_few_launches<AdEMAMix, ApplyUpdate>();
  ApplyUpdate stochastic;
  stochastic.is_stochastic = true;
  test_kinds_do_not_mix<Lion, StoreUpdate>();
  test_few_launches<FourNumbers, StoreUpdate>();
  test_few_launches<ScheduledAdam, ApplyUpdate>();
  test_kinds_do_not_mix<AdEMAMix, ApplyUpdate>();
  test_kinds_do_not_mix<FourNumbers, StoreUpdate>();
  test_kinds_do_not_mix<FourNumbers, ApplyUpdate>();
  test_kinds_do_not_mix<AdEMAMix, ApplyUpdate>(stochastic);
  test_setup();
  test_counters();
  test_scalar_states();
  test_huge_rows();
  test_chunks();
  test_peel();
}
