// What the CUDA kernel does, run on the host thread by thread: every rule against the rule called
// element by element. AddressSanitizer sees each access out of bounds, UndefinedBehaviorSanitizer
// each vector that is not aligned.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "engine/cuda/plan.h"
#include "rules/all.h"
#include "run_on_host.h"

using namespace emopt;

namespace {

struct RunOnHost {
  int64_t* num_vector_rows;

  template <class Launch>
  void operator()(int8_t, const Launch& launch, uint32_t num_blocks) const {
    for (uint32_t row = 0; row < launch.num_rows; ++row) {
      *num_vector_rows += launch.peel[row] != cuda::kNoPhase;
    }
    run_on_host(launch, num_blocks);
  }
};

enum class Offsets { kNone, kEqual, kAny };

int64_t random_size(std::mt19937_64& random) {
  constexpr int64_t kChunk = cuda::kChunk;
  constexpr int64_t kTile = cuda::kTile;
  const int64_t around[] = {
      0,         1, 8, 16, kTile - 8, kTile / 2, kTile, kTile + kTile / 2, kChunk, kChunk + kTile,
      2 * kChunk};
  const int64_t size =
      around[random() % std::size(around)] + static_cast<int64_t>(random() % 33) - 16;
  return size < 0 ? 0 : size;
}

template <class Rule>
void check(const Rule& rule, Offsets offsets, std::mt19937_64& random) {
  constexpr int kOperands = kNumOperands<Rule>;
  // Half of the rounds in one type, the others in mixes, of which rows of one kind share launches.
  std::vector<std::vector<DType>> mixes(3, std::vector<DType>(kOperands));
  const bool is_uniform = random() % 2 == 0;
  for (auto& mix : mixes) {
    const DType type = kTypes[random() % 4];
    for (DType& dtype : mix) dtype = is_uniform ? type : kTypes[random() % 4];
  }
  std::vector<std::vector<Buffer>> rows;
  for (int r = 0; r < 4; ++r) {
    const auto& mix = mixes[random() % mixes.size()];
    const int64_t numel = random_size(random);
    const size_t shared = random() % 40;
    std::vector<Buffer> operands;
    for (const DType dtype : mix) {
      const size_t before = offsets == Offsets::kNone    ? 0
                            : offsets == Offsets::kEqual ? shared
                                                         : random() % 40;
      operands.emplace_back(dtype, numel, before, random);
    }
    rows.push_back(std::move(operands));
  }
  std::vector<std::vector<Buffer>> expected = rows;
  Table<kOperands> table;
  int64_t num_filled = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    Row<kOperands> row = row_of<kOperands>(rows[r], r % 2 == 0 ? 1.0 : 0.3);
    row.device = 0;
    table.append(row);
    num_filled += row.numel != 0;
    apply_by_hand(rule, 3, row, expected[r]);
  }
  const float step32 = 3;
  const int64_t step64 = 3;
  const StepSource sources[] = {{3.0, nullptr, false}, {0.0, &step32, false}, {0.0, &step64, true}};
  int64_t num_vector_rows = 0;
  cuda::for_each_launch(rule, sources[random() % 3], table, random() % 2 == 0,
                        RunOnHost{&num_vector_rows});
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t k = 0; k < kOperands; ++k) CHECK(rows[r][k].bytes == expected[r][k].bytes);
  }
  if (offsets == Offsets::kNone || (offsets == Offsets::kEqual && is_uniform)) {
    CHECK(num_vector_rows == num_filled);  // else the vectors' loop was not what was tested
  }
}

template <class Rule>
void check_rule(const Rule& rule) {
  std::mt19937_64 random(0);
  for (const Offsets offsets : {Offsets::kNone, Offsets::kEqual, Offsets::kAny}) {
    for (int round = 0; round < 25; ++round) check(rule, offsets, random);
  }
}

// The update may be the gradient.
void test_update_in_place_of_gradient() {
  std::mt19937_64 random(0);
  const Lion rule{0.9, 0.99};
  for (const DType dtype : kTypes) {
    for (const size_t before : {0, 1}) {
      const int64_t numel = cuda::kChunk + cuda::kTile + 13;
      std::vector<Buffer> operands(3, Buffer(dtype, numel, before, random));
      std::vector<Buffer> expected = operands;
      Row<3> row = row_of<3>(operands, 1.0);
      apply_by_hand(rule, 1, row, expected);
      row.device = 0;
      row.data[kGrad] = row.data[kUpdate];
      Table<3> table;
      table.append(row);
      int64_t ignored = 0;
      cuda::for_each_launch(rule, {1.0, nullptr, false}, table, true, RunOnHost{&ignored});
      CHECK(operands[kUpdate].bytes == expected[kUpdate].bytes);
      CHECK(operands[kFirstState].bytes == expected[kFirstState].bytes);
    }
  }
}

// Chunks that start beyond 2^31 elements: in address space that is reserved, but mostly not backed.
void test_beyond_two_to_the_31() {
  const Lion rule{0.9, 0.99};
  const int64_t numel = (int64_t{1} << 31) + 2 * cuda::kChunk + 5;
  Row<3> row{};
  row.device = 0;
  row.numel = numel;
  row.scale = 1.0;
  for (int k = 0; k < 3; ++k) {
    row.dtype[k] = DType::kBFloat16;
    row.data[k] = mmap(nullptr, static_cast<size_t>(numel) * 2, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(row.data[k] != MAP_FAILED);
  }
  Table<3> table;
  table.append(row);
  const auto at = [&](int k, int64_t i) { return static_cast<BFloat16*>(row.data[k]) + i; };
  const int64_t places[] = {(int64_t{1} << 31) - 1, int64_t{1} << 31, numel - 1};
  for (const int64_t i : places) *at(kGrad, i) = Round<BFloat16>::from(-2.0F);
  const auto last_blocks = [&](int8_t, const auto& launch, uint32_t num_blocks) {
    CHECK(num_blocks == cuda::num_chunks(numel));
    for (uint32_t block = num_blocks - 4; block < num_blocks; ++block) {
      for (uint32_t thread = 0; thread < cuda::kThreads; thread += 2) {
        cuda::sweep_chunk<StoreUpdate, 2>(launch, launch.step, block, thread);
      }
    }
  };
  cuda::for_each_launch(rule, {1.0, nullptr, false}, table, true, last_blocks);
  for (const int64_t i : places) {
    CHECK(widen(*at(kUpdate, i)) == -1.0F);
    CHECK(widen(*at(kFirstState, i)) ==
          widen(Round<BFloat16>::from(-2.0F * static_cast<float>(1 - 0.99))));
  }
  CHECK(widen(*at(kUpdate, numel - 2)) == 0.0F);
  CHECK(widen(*at(kUpdate, 0)) == 0.0F);
  for (int k = 0; k < 3; ++k) munmap(row.data[k], static_cast<size_t>(numel) * 2);
}

}  // namespace

int main() {
  check_rule(Adam{{0.9, 0.999}, true, true, 1e-8});
  check_rule(AdEMAMix{10, 20, {0.9, 0.999, 0.9999}, 1e-8, true, 5.0});
  check_rule(LaProp{true, {0.9, 0.999}, 1e-8});
  check_rule(Lion{0.9, 0.99});
  check_rule(Signum{0.9, true, true, false});
  check_rule(SimAdEMAMix{10, 0.9, {0.9999, 0.999}, 1e-8, true, 2.0});
  test_update_in_place_of_gradient();
  test_beyond_two_to_the_31();
}
