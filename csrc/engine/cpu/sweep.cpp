#include "sweep.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "driver.h"

namespace emopt::cpu {

namespace {

// The fewest elements that are worth another thread. On two Zen 3 cores with the operands in their
// caches, two threads took 0.7 (Adam) and 0.8 (Lion) of one thread's time for 20480 elements; one
// thread sweeps 16384 in 7 and 3.5 us.
constexpr int64_t kGrain = 16384;
// A row takes as long as so many of its elements, at least.
constexpr int64_t kRowElements = 64;

}  // namespace

template <int kStates, class Epilogue>
void sweep_in_parallel(const RuleInstance& rule, double step, const Epilogue& epilogue,
                       const Table<kNumOperands<kStates, Epilogue>>* tables, size_t count) {
  if (epilogue.is_skipped()) return;
  int64_t numel = 0, num_rows = 0;
  bool any_float64 = false;
  for (size_t i = 0; i < count; ++i) {
    numel += tables[i].numel;
    num_rows += static_cast<int64_t>(tables[i].rows.size());
    any_float64 |= tables[i].any_float64;
  }
  if (numel == 0) return;
  const Setup<Epilogue> setup(rule, step, epilogue, active_isa(), any_float64);
  const int64_t work = numel + kRowElements * num_rows;
  const int64_t grain = work <= kGrain ? numel : 1 + kGrain * numel / work;
  at::parallel_for(0, numel, grain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (size_t i = 0; i < count && start < end; start += tables[i++].numel) {
      const auto place = [&](int64_t element) {
        return place_of(tables[i], std::max(element - start, int64_t{0}), kTile);
      };
      sweep_between<kStates>(setup, tables[i], place(begin), place(end));
    }
  });
}

#define EMOPT_INSTANTIATE(kStates, Epilogue)                                             \
  template void sweep_in_parallel<kStates>(const RuleInstance&, double, const Epilogue&, \
                                           const Table<kNumOperands<kStates, Epilogue>>*, size_t);
EMOPT_FOR_EACH_SWEEP(EMOPT_INSTANTIATE)

}  // namespace emopt::cpu
