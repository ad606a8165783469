// From a table to launches: every chunk of every row is one block's, rows of different kinds do not
// meet, and launches are few. No memory is touched.
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <tuple>
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

template <int kOperands>
Row<kOperands> row_with(size_t r, int64_t numel, DType dtype, int8_t device) {
  Row<kOperands> row{};
  row.numel = numel;
  row.device = device;
  row.scale = static_cast<double>(r);
  row.compute = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (int k = 0; k < kOperands; ++k) {
    row.data[k] = address(r, k);
    row.dtype[k] = dtype;
  }
  return row;
}

template <class Rule>
int count_launches(const Table<kNumOperands<Rule>>& table, bool allow_large) {
  int launches = 0;
  // Which chunks of which row were given out.
  std::map<const void*, std::set<int64_t>> chunks;
  std::map<const void*, const Row<kNumOperands<Rule>>*> rows;
  for (const auto& row : table.rows) rows[row.data[0]] = &row;
  cuda::for_each_launch(
      Rule{}, {1.0, nullptr, false}, table, allow_large,
      [&](int8_t device, const auto& launch, uint32_t num_blocks) {
        using Launch = std::decay_t<decltype(launch)>;
        static_assert(sizeof(Launch) <= cuda::kLargeLaunch);
        static_assert(std::is_trivially_copyable_v<Launch>);
        CHECK(allow_large || sizeof(Launch) <= cuda::kSmallLaunch);
        CHECK(num_blocks > 0 && launch.num_rows > 0 && launch.num_rows <= Launch::kCapacity);
        ++launches;
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
          CHECK(chunk * cuda::kChunk < row.numel);
          CHECK(chunks[row.data[0]].insert(chunk).second);
        }
      });
  for (const auto& row : table.rows) {
    const size_t wanted =
        row.device == kHost ? 0 : static_cast<size_t>(cuda::num_chunks(row.numel));
    CHECK(chunks[row.data[0]].size() == wanted);
  }
  return launches;
}

template <class Rule>
Table<kNumOperands<Rule>> table_of(size_t count, int64_t numel) {
  Table<kNumOperands<Rule>> table;
  for (size_t r = 0; r < count; ++r) {
    table.append(row_with<kNumOperands<Rule>>(r, numel, DType::kFloat32, 0));
  }
  return table;
}

template <class Rule>
void test_few_launches() {
  CHECK(count_launches<Rule>({}, true) == 0);
  CHECK(count_launches<Rule>(table_of<Rule>(100, 0), true) == 0);
  CHECK(count_launches<Rule>(table_of<Rule>(1, 5), true) == 1);
  CHECK(count_launches<Rule>(table_of<Rule>(500, 100), true) == 1);
  CHECK(count_launches<Rule>(table_of<Rule>(1000, 100), true) <= 2);
  CHECK(count_launches<Rule>(table_of<Rule>(100, 3 * cuda::kChunk + 1), false) > 1);
}

void test_kinds_do_not_meet() {
  constexpr DType kKinds[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16};
  std::mt19937_64 random(0);
  for (int round = 0; round < 200; ++round) {
    Table<4> table;
    std::set<std::pair<int, DType>> kinds;
    for (size_t r = random() % 300; r > 0; --r) {
      const auto device = static_cast<int8_t>(static_cast<int>(random() % 3) - 1);
      const DType dtype = kKinds[random() % 3];
      const auto numel = static_cast<int64_t>(random() % 4 * (cuda::kChunk / 2 + random() % 3));
      table.append(row_with<4>(r, numel, dtype, device));
      if (device != kHost && numel != 0) kinds.insert({device, dtype});
    }
    CHECK(count_launches<Adam>(table, true) == static_cast<int>(kinds.size()));
    CHECK(count_launches<Adam>(table, false) >= static_cast<int>(kinds.size()));
  }
}

// More blocks than a launch may have are shared out; offsets are of 64 bits.
void test_huge_rows() {
  const int64_t half = cuda::kMaxBlocks / 2 * cuda::kChunk + 1;
  Table<3> table;
  for (size_t r = 0; r < 3; ++r) table.append(row_with<3>(r, half, DType::kBFloat16, 0));
  std::vector<uint32_t> blocks;
  cuda::for_each_launch(Lion{0.9, 0.99}, {1.0, nullptr, false}, table, true,
                        [&](int8_t, const auto& launch, uint32_t num_blocks) {
                          blocks.push_back(num_blocks);
                          CHECK(launch.row_of(num_blocks - 1) == launch.num_rows - 1);
                          CHECK(launch.numel[0] == half);
                        });
  CHECK(blocks.size() == 3);
  for (const uint32_t count : blocks) CHECK(count == cuda::kMaxBlocks / 2 + 1);
}

// After the peel each operand is at a multiple of 16 bytes; and if there is one, it is found.
void test_peel() {
  std::mt19937_64 random(0);
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  int found = 0;
  for (int round = 0; round < 100000; ++round) {
    void* data[4];
    DType dtype[4];
    for (int k = 0; k < 4; ++k) {
      dtype[k] = kAll[random() % 4];
      const uint64_t element = round % 2 == 0 ? random() % 16 : 3 + 8 * (random() % 2);
      data[k] = reinterpret_cast<void*>(4096 + element * static_cast<uint64_t>(size_of(dtype[k])));
    }
    const uint8_t peel = cuda::peel_of(data, dtype, 4);
    const auto is_aligned_after = [&](uint64_t elements) {
      for (int k = 0; k < 4; ++k) {
        const uint64_t bytes = elements * static_cast<uint64_t>(size_of(dtype[k]));
        if ((reinterpret_cast<uint64_t>(data[k]) + bytes) % 16 != 0) return false;
      }
      return true;
    };
    if (peel == cuda::kNoPhase) {
      for (uint64_t elements = 0; elements < 64; ++elements) CHECK(!is_aligned_after(elements));
    } else {
      ++found;
      CHECK(peel < 8 && is_aligned_after(peel));
    }
    if (round % 2 != 0) CHECK(peel != cuda::kNoPhase);  // all of them at element 3 of 8
  }
  CHECK(found > 50000);
}

}  // namespace

int main() {
#define EMOPT_TEST(Rule) test_few_launches<Rule>();
  EMOPT_FOR_EACH_RULE(EMOPT_TEST)
  test_kinds_do_not_meet();
  test_huge_rows();
  test_peel();
}
