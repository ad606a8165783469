// Rows with 8-bit codes in the CUDA kernels' code on the host, against a reference.
// AddressSanitizer reports out-of-bounds accesses, UndefinedBehaviorSanitizer misaligned vectors.
// The threads that hold a group run together (run_on_host.h); on a device they exchange ranks by
// shuffles.
#include <cstdint>
#include <list>
#include <random>

#include "cases.h"
#include "check.h"
#include "coded_rows.h"
#include "engine/rule_unit.h"
#include "launches.h"
#include "plugin_rules.h"
#include "run_on_host.h"

using namespace emopt;

namespace {

constexpr DType kWide[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

int64_t random_size(std::mt19937_64& random) {
  constexpr int64_t kSizes[] = {0, 0, 1, cuda::kTile / 2, cuda::kTile, cuda::kMaxChunk};
  // The last group may be short.
  return one_of(kSizes, random) + static_cast<int64_t>(random() % 100);
}

template <class Rule>
void check(const Rule& rule, size_t most_before, std::mt19937_64& random) {
  ApplyUpdate epilogue = random_epilogue<ApplyUpdate>(random);
  epilogue.found_inf.value = one_of({0.0, 0.0, 0.0, 1.0}, random);
  const bool is_skipped = epilogue.found_inf.value != 0.0;
  CodedRows<Rule> rows;
  std::list<float> counters, wanted;
  size_t num_filled = 0;
  for (size_t r = 0; r < 5; ++r) {
    float* counter = nullptr;
    double step = 3;
    if (random() % 2 == 0) {
      counter = &counters.emplace_back(static_cast<float>(random() % 20));
      step = static_cast<double>(*counter + 1.0F);
      wanted.push_back(is_skipped ? *counter : *counter + 1.0F);
    }
    // The high 32 bits of an index change at the first group, at a later one, or not at all.
    const uint64_t first_index = (uint64_t{r} << 32) - 64 * r;
    const int64_t numel = random_size(random);
    rows.add(CodedRow<Rule>(numel, kWide, most_before, random),
             rows.random_place(r, first_index, random), rule, step, epilogue, 0, counter);
    num_filled += numel != 0;
  }
  size_t num_vectors = 0;
  const auto run = [&](int8_t, const auto& launch, auto... num_blocks) {
    if constexpr (sizeof...(num_blocks) == 0) {
      run_on_host(launch);
    } else if constexpr (sizeof(launch) <= cuda::kSmallLaunch) {
      for (uint32_t row = 0; row < launch.num_rows; ++row) {
        num_vectors += launch.peel[row] == 0;
        CHECK(!launch.kHasCodes || launch.peel[row] == 0 || launch.peel[row] == cuda::kNoPhase);
      }
      run_on_host(launch, num_blocks...);
    } else {
      CHECK(!"the same code once more, for more rows than there are here");
    }
  };
  const float device_found_inf = static_cast<float>(epilogue.found_inf.value);
  ApplyUpdate on_device = epilogue;
  if (random() % 2 == 0) on_device.found_inf = {0.0, &device_found_inf};
  const cuda::Chip chip{one_of({1U, 2U, 132U}, random), random() % 2 == 0};
  for_each_launch(rule, {3.0}, on_device, rows.table, chip, run);
  rows.check();
  CHECK(counters == wanted);
  if (most_before == 0 && !is_skipped) CHECK(num_vectors == num_filled);
}

}  // namespace

int main() {
  std::mt19937_64 random(0);
  for (int round = 0; round < 12; ++round) {
    // A group's largest number would be one behind its end.
    check(DriftingAverages{0.9, 100.0}, random() % 2 * 5, random);
  }
  for_each_rule([&](const auto& rule) {
    using Rule = std::decay_t<decltype(rule)>;
    if constexpr (kMayHaveCodes<Rule>) {
      for (int round = 0; round < 6; ++round) {
        check(rule, 0, random);
        check(rule, 5, random);
      }
    }
  });
}
