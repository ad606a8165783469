// From a table to launches: every chunk of every row is one block's, rows of different kinds do not
// meet, launches are few, and every counter is advanced once. No memory is touched.
#include <cstdint>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "engine/cuda/plan.h"
#include "rules/all.h"

using namespace emopt;

namespace {

// An address that stands for row `r`'s operand `k`.
void* address(size_t r, int k) {
  return reinterpret_cast<void*>((r + 1) * 4096 + 16 * static_cast<size_t>(k));
}

cuda::Chip any_chip(int8_t) { return {132, true}; }

float* counter_of(size_t r) { return reinterpret_cast<float*>((r + 1) * 4096 + 2048); }

// Every third row has a counter.
template <int kOperands>
Row<kOperands> row_with(size_t r, int64_t numel, DType dtype, int8_t device) {
  Row<kOperands> row{};
  row.numel = numel;
  row.device = device;
  row.scale = static_cast<double>(r);
  row.position = 10 * r + (uint64_t{r} << 32);
  row.first_index = (uint64_t{r} << 33) + 3;
  row.step = device != kHost && r % 3 == 0 ? counter_of(r) : nullptr;
  row.compute = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (int k = 0; k < kOperands; ++k) {
    row.data[k] = address(r, k);
    row.dtype[k] = dtype;
  }
  return row;
}

template <class Launch>
constexpr bool is_sound() {
  static_assert(std::is_trivially_copyable_v<Launch>);
  static_assert(sizeof(Launch) <= Launch::kBytes);
  static_assert(sizeof(Launch) + Launch::kRowBytes + 64 > Launch::kBytes, "room is wasted");
  // No float64 kernels for many rows.
  static_assert(Launch::kBytes == cuda::kSmallLaunch || sizeof(typename Launch::Real) == 4);
  return true;
}

template <class Rule, class Epilogue>
int count_launches(const Table<kNumOperands<Rule, Epilogue>>& table, const cuda::Chip& chip,
                   const Epilogue& epilogue = {}) {
  int launches = 0;
  // Which chunks of which row were given out.
  std::map<const void*, std::set<int64_t>> chunks;
  std::map<const void*, size_t> wanted;
  std::map<const void*, const Row<kNumOperands<Rule, Epilogue>>*> rows;
  for (const auto& row : table.rows) rows[row.data[0]] = &row;
  cuda::for_each_launch(
      Rule{}, {1.0}, epilogue, table, [&](int8_t) { return chip; },
      [&](int8_t device, const auto& launch, uint32_t num_blocks) {
        using Launch = std::decay_t<decltype(launch)>;
        static_assert(is_sound<Launch>());
        CHECK(chip.takes_large_launches || sizeof(Launch) <= cuda::kSmallLaunch);
        CHECK(num_blocks > 0 && launch.num_rows > 0 && launch.num_rows <= Launch::kCapacity);
        ++launches;
        bool any_needs_setup = epilogue.is_on_device();
        int64_t total = 0;
        for (uint32_t r = 0; r < launch.num_rows; ++r) {
          const auto& row = *rows.at(launch.data[0][r]);
          total += row.numel;
          wanted[row.data[0]] = static_cast<size_t>(cuda::ceil_div(row.numel, launch.chunk));
          if constexpr (Epilogue::kHasRowSteps) {
            CHECK(launch.steps[r].counter == row.step);
            CHECK(launch.steps[r].position == row.position);
            CHECK(launch.steps[r].first_index == row.first_index);
            any_needs_setup |= row.step != nullptr;
            any_needs_setup |=
                epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
          }
        }
        CHECK(launch.needs_setup == any_needs_setup);
        const int64_t at_a_time = chip.multiprocessors * Launch::num_blocks(any_needs_setup);
        CHECK(launch.chunk == cuda::chunk_for(total, at_a_time));
        for (uint32_t block = 0; block < num_blocks; ++block) {
          const uint32_t r = launch.row_of(block);
          CHECK(r < launch.num_rows);
          const auto& row = *rows.at(launch.data[0][r]);
          CHECK(row.device == device && row.device != kHost);
          CHECK((row.compute == DType::kFloat64) == (sizeof(typename Launch::Real) == 8));
          CHECK(launch.numel[r] == row.numel);
          CHECK(launch.scale[r] == static_cast<typename Launch::Real>(row.scale));
          for (int k = 0; k < Launch::kOperands; ++k) {
            CHECK(launch.data[k][r] == row.data[k] && launch.dtype[k] == row.dtype[k]);
          }
          const int64_t chunk = block - launch.first_block[r];
          CHECK(chunk * launch.chunk < row.numel);
          CHECK(chunks[row.data[0]].insert(chunk).second);
        }
      });
  for (const auto& row : table.rows) {
    CHECK((wanted.count(row.data[0]) != 0) == (row.device != kHost && row.numel != 0));
    CHECK(chunks[row.data[0]].size() == wanted[row.data[0]]);
  }
  return launches;
}

template <class Rule, class Epilogue, class Real, size_t kBytes>
constexpr size_t kCapacity = cuda::Launch<Rule, Epilogue, Real, kBytes>::kCapacity;

// In how many launches this many rows of one kind fit.
template <class Rule, class Epilogue>
size_t fewest_launches(size_t count, DType dtype, bool allow_large) {
  const auto of = [&](size_t capacity) { return (count + capacity - 1) / capacity; };
  if (dtype == DType::kFloat64) return of(kCapacity<Rule, Epilogue, double, cuda::kSmallLaunch>);
  const size_t small = of(kCapacity<Rule, Epilogue, float, cuda::kSmallLaunch>);
  if (!allow_large || small <= 1) return small;
  return of(kCapacity<Rule, Epilogue, float, cuda::kLargeLaunch>);
}

template <class Rule, class Epilogue>
void test_few_launches() {
  constexpr int kOperands = kNumOperands<Rule, Epilogue>;
  const auto count = [](size_t num_rows, int64_t numel, DType dtype, bool allow_large) {
    Table<kOperands> table;
    for (size_t r = 0; r < num_rows; ++r) table.append(row_with<kOperands>(r, numel, dtype, 0));
    const int launches = count_launches<Rule, Epilogue>(table, {132, allow_large});
    const size_t fewest = fewest_launches<Rule, Epilogue>(num_rows, dtype, allow_large);
    CHECK(numel == 0 || static_cast<size_t>(launches) == fewest);
    return launches;
  };
  CHECK(count(0, 1, DType::kFloat32, true) == 0);
  CHECK(count(100, 0, DType::kFloat32, true) == 0);
  CHECK(count(1, 5, DType::kFloat32, true) == 1);
  CHECK(count(Epilogue::kHasRowSteps ? 350 : 500, 100, DType::kFloat32, true) == 1);
  CHECK(count(1000, 100, DType::kFloat32, true) <= (Epilogue::kHasRowSteps ? 3 : 2));
  CHECK(count(100, 3 * cuda::kMaxChunk + 1, DType::kFloat32, false) > 1);
  count(1000, 100, DType::kFloat64, true);
}

template <class Rule, class Epilogue>
void test_kinds_do_not_meet(const Epilogue& epilogue = {}) {
  constexpr int kOperands = kNumOperands<Rule, Epilogue>;
  constexpr DType kKinds[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16};
  std::mt19937_64 random(0);
  for (int round = 0; round < 100; ++round) {
    Table<kOperands> table;
    std::map<std::pair<int, DType>, size_t> kinds;
    for (size_t r = random() % 300; r > 0; --r) {
      const auto device = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
      const DType dtype = kKinds[random() % 3];
      const auto numel = static_cast<int64_t>(random() % 4 * (cuda::kMaxChunk / 2 + random() % 3));
      table.append(row_with<kOperands>(r, numel, dtype, device));
      if (device != kHost && numel != 0) ++kinds[{device, dtype}];
    }
    for (const bool allow_large : {true, false}) {
      size_t fewest = 0;
      for (const auto& [kind, count] : kinds) {
        fewest += fewest_launches<Rule, Epilogue>(count, kind.second, allow_large);
      }
      const int launches = count_launches<Rule, Epilogue>(table, {1, allow_large}, epilogue);
      CHECK(static_cast<size_t>(launches) == fewest);
    }
  }
}

// Blocks read what they need to know only where the host does not know it.
void test_setup() {
  static const float number = 0.0F;  // on a device, as far as the plan is concerned
  const auto needs_setup = [](const Number& step, const ApplyUpdate& epilogue, DType dtype) {
    constexpr int kOperands = kNumOperands<Adam, ApplyUpdate>;
    Table<kOperands> table;
    table.append(row_with<kOperands>(1, 5, dtype, 0));
    CHECK(table.rows[0].step == nullptr);
    bool result = false;
    cuda::for_each_launch(
        Adam{}, step, epilogue, table, any_chip,
        [&](int8_t, const auto& launch, uint32_t) { result = launch.needs_setup; });
    return result;
  };
  ApplyUpdate stochastic;
  stochastic.is_stochastic = true;
  CHECK(!needs_setup({1.0}, {}, DType::kFloat32));
  CHECK(needs_setup({0.0, &number}, {}, DType::kFloat32));
  CHECK(!needs_setup({1.0}, stochastic, DType::kFloat32));
  CHECK(needs_setup({1.0}, stochastic, DType::kBFloat16));
  for (Number ApplyUpdate::* const member : {&ApplyUpdate::lr, &ApplyUpdate::grad_multiplier,
                                             &ApplyUpdate::grad_scale, &ApplyUpdate::found_inf}) {
    ApplyUpdate epilogue;
    epilogue.*member = {0.0, &number};
    CHECK(needs_setup({1.0}, epilogue, DType::kFloat32));
  }
}

// A step that the host knows to be skipped has no launches.
void test_known_skip() {
  constexpr int kOperands = kNumOperands<Adam, ApplyUpdate>;
  Table<kOperands> table;
  table.append(row_with<kOperands>(1, 5, DType::kFloat32, 0));
  ApplyUpdate epilogue;
  epilogue.found_inf.value = 1.0;
  cuda::for_each_launch(Adam{}, {1.0}, epilogue, table, any_chip,
                        [](int8_t, const auto&, uint32_t) { CHECK(false); });
}

// Each counter once, on its device, those of rows without elements too; in as few launches as they
// fit in where rows of one device are side by side.
void test_counters() {
  constexpr uint32_t kCapacity = cuda::Advance::kCapacity;
  static_assert(sizeof(cuda::Advance) <= cuda::kSmallLaunch);
  static_assert(sizeof(cuda::Advance) + sizeof(float*) > cuda::kSmallLaunch, "room is wasted");
  static const float found_inf = 0.0F;
  const auto count = [](const Table<3>& table) {
    std::map<const float*, int8_t> counters;
    size_t launches = 0;
    cuda::for_each_advance(table, {0.0, &found_inf},
                           [&](int8_t device, const cuda::Advance& advance) {
                             CHECK(advance.count > 0 && advance.count <= kCapacity);
                             CHECK(advance.found_inf.address == &found_inf);
                             for (uint32_t i = 0; i < advance.count; ++i) {
                               CHECK(counters.insert({advance.counters[i], device}).second);
                             }
                             ++launches;
                           });
    size_t wanted = 0;
    for (const auto& row : table.rows) {
      if (row.step == nullptr) continue;
      CHECK(counters.at(row.step) == row.device);
      ++wanted;
    }
    CHECK(counters.size() == wanted);
    return launches;
  };
  CHECK(count({}) == 0);
  for (const size_t num_counters :
       {size_t{1}, size_t{kCapacity}, size_t{kCapacity} + 1, 3 * size_t{kCapacity} + 7}) {
    for (const int num_devices : {1, 2, 3}) {
      Table<3> table;
      for (int8_t device = kHost; device < num_devices; ++device) {
        for (size_t r = 0; r < 3 * num_counters; ++r) {  // every third row has one
          const size_t number = r + 3 * num_counters * static_cast<size_t>(device + 1);
          table.append(row_with<3>(number, r % 2 == 0 ? 0 : 5, DType::kFloat32, device));
        }
      }
      const size_t fewest = (num_counters + kCapacity - 1) / kCapacity;
      CHECK(count(table) == fewest * static_cast<size_t>(num_devices));
    }
  }
  Table<3> mixed;  // rows of the devices in turn
  for (size_t r = 0; r < 100; ++r) {
    mixed.append(row_with<3>(r, 5, DType::kFloat32, static_cast<int8_t>(r / 3 % 3 - 1)));
  }
  count(mixed);
}

// More blocks than a launch may have are shared out; offsets are of 64 bits.
void test_huge_rows() {
  const int64_t half = cuda::kMaxBlocks / 2 * cuda::kMaxChunk + 1;
  Table<3> table;
  for (size_t r = 0; r < 3; ++r) table.append(row_with<3>(r, half, DType::kBFloat16, 0));
  std::vector<uint32_t> blocks;
  cuda::for_each_launch(Lion{0.9, 0.99}, {1.0}, StoreUpdate{}, table, any_chip,
                        [&](int8_t, const auto& launch, uint32_t num_blocks) {
                          blocks.push_back(num_blocks);
                          CHECK(launch.row_of(num_blocks - 1) == launch.num_rows - 1);
                          CHECK(launch.numel[0] == half && launch.chunk == cuda::kMaxChunk);
                        });
  CHECK(blocks.size() == 3);
  for (const uint32_t count : blocks) CHECK(count == cuda::kMaxBlocks / 2 + 1);
}

// Blocks fill what runs at a time, once or again and again, as far as a tile for each allows.
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
  CHECK(cuda::chunk_for(1 << 20, 528) == 2 * cuda::kTile);  // 512 blocks
  CHECK(cuda::chunk_for(1 << 28, 528) == cuda::kMaxChunk);
}

// After the peel each operand is where a vector may be; and if there is such a place, it is found.
void test_peel() {
  std::mt19937_64 random(0);
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  int found = 0;
  for (int round = 0; round < 100000; ++round) {
    void* data[4];
    DType dtype[4];
    for (int k = 0; k < 4; ++k) {
      dtype[k] = kAll[random() % 4];
      const uint64_t element = round % 2 == 0 ? random() % 16 : 3 + 4 * (random() % 4);
      data[k] = reinterpret_cast<void*>(4096 + element * static_cast<uint64_t>(size_of(dtype[k])));
    }
    const uint8_t peel = cuda::peel_of(data, dtype, 4);
    const auto is_aligned_after = [&](uint64_t elements) {
      for (int k = 0; k < 4; ++k) {
        const uint64_t bytes = elements * static_cast<uint64_t>(size_of(dtype[k]));
        const uint64_t vector = size_of(dtype[k]) == 2 ? 8 : 16;
        if ((reinterpret_cast<uint64_t>(data[k]) + bytes) % vector != 0) return false;
      }
      return true;
    };
    if (peel == cuda::kNoPhase) {
      for (uint64_t elements = 0; elements < 64; ++elements) CHECK(!is_aligned_after(elements));
    } else {
      ++found;
      CHECK(peel < 4 && is_aligned_after(peel));
    }
    if (round % 2 != 0) CHECK(peel != cuda::kNoPhase);  // all of them at element 3 of 4
  }
  CHECK(found > 50000);
}

}  // namespace

int main() {
#define EMOPT_TEST_WITH(Rule, Epilogue) test_few_launches<Rule, Epilogue>();
#define EMOPT_TEST(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_TEST_WITH, Rule)
  EMOPT_FOR_EACH_RULE(EMOPT_TEST)
  ApplyUpdate stochastic;
  stochastic.is_stochastic = true;
  test_kinds_do_not_meet<Adam, StoreUpdate>();
  test_kinds_do_not_meet<Adam, ApplyUpdate>();
  test_kinds_do_not_meet<Lion, ApplyUpdate>(stochastic);
  test_setup();
  test_known_skip();
  test_counters();
  test_huge_rows();
  test_chunks();
  test_peel();
}
