// From a table to launches: which rows go together, and in how many launches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "launch.h"

namespace emopt::cuda {

// What all rows of a launch have in common: the device, and the type of each operand.
template <int kOperands>
uint64_t launch_key(const Row<kOperands>& row) {
  static_assert(kOperands <= 7, "a byte each");
  uint64_t key = static_cast<uint8_t>(row.device);
  for (int k = 0; k < kOperands; ++k) key = key << 8 | static_cast<uint8_t>(row.dtype[k]);
  return key;
}

// The rows on CUDA devices that have elements, those of one key side by side, else in order.
template <int kOperands>
std::vector<const Row<kOperands>*> rows_by_key(const Table<kOperands>& table) {
  std::vector<const Row<kOperands>*> rows;
  rows.reserve(table.rows.size());
  bool is_uniform = true;
  uint64_t first_key = 0;
  for (const Row<kOperands>& row : table.rows) {
    if (row.device == kHost || row.numel == 0) continue;
    const uint64_t key = launch_key(row);
    if (rows.empty()) first_key = key;
    is_uniform &= key == first_key;
    rows.push_back(&row);
  }
  if (!is_uniform) {
    std::stable_sort(rows.begin(), rows.end(),
                     [](const auto* a, const auto* b) { return launch_key(*a) < launch_key(*b); });
  }
  return rows;
}

// Fills one launch with rows from `begin` on, and hands it to `enqueue(device, launch, blocks)`.
// Returns the first row that it has no more room for.
template <class Launch, class Iterator, class Enqueue>
Iterator fill_and_enqueue(const typename Launch::Rule& rule, const Number& step,
                          const typename Launch::Epilogue& epilogue, Iterator begin, Iterator end,
                          Enqueue& enqueue) {
  constexpr int kOperands = Launch::kOperands;
  Launch launch(rule, step, epilogue, (*begin)->dtype);
  launch.needs_setup = step.is_on_device() || epilogue.is_on_device();
  int64_t blocks = 0;
  Iterator at = begin;
  for (; at != end && launch.num_rows < Launch::kCapacity; ++at) {
    const Row<kOperands>& row = **at;
    const int64_t chunks = num_chunks(row.numel);
    if (blocks + chunks > kMaxBlocks && at != begin) break;
    const uint32_t r = launch.num_rows++;
    for (int k = 0; k < kOperands; ++k) launch.data[k][r] = row.data[k];
    launch.numel[r] = row.numel;
    launch.scale[r] = static_cast<typename Launch::Real>(row.scale);
    launch.first_block[r] = static_cast<uint32_t>(blocks);
    launch.peel[r] = peel_of(row.data, row.dtype, kOperands);
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      launch.steps.counter[r] = row.step;
      launch.steps.position[r] = row.position;
      launch.steps.first_index[r] = row.first_index;
      const bool has_key = epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
      launch.needs_setup |= row.step != nullptr || has_key;
    }
    blocks += chunks;
  }
  enqueue((*begin)->device, launch, static_cast<uint32_t>(blocks));
  return at;
}

// Hands the counters of all rows that have one to `enqueue(device, advance)`.
template <int kOperands, class Enqueue>
void for_each_advance(const Table<kOperands>& table, const Number& found_inf, Enqueue enqueue) {
  Advance advance{found_inf, 0, {}};
  int8_t device = kHost;
  const auto flush = [&] {
    if (advance.count != 0) enqueue(device, advance);
    advance.count = 0;
  };
  for (const Row<kOperands>& row : table.rows) {
    if (row.step == nullptr) continue;
    if (row.device != device || advance.count == Advance::kCapacity) flush();
    device = row.device;
    advance.counters[advance.count++] = row.step;
  }
  flush();
}

// Hands all rows on CUDA devices to `enqueue`, in as few launches as they fit in.
template <class Rule, class Epilogue, class Enqueue>
void for_each_launch(const Rule& rule, const Number& step, const Epilogue& epilogue,
                     const Table<kNumOperands<Rule, Epilogue>>& table, bool allow_large,
                     Enqueue enqueue) {
  // Launches that need no setup do not ask whether they are to be skipped.
  if (!epilogue.is_on_device() && epilogue.is_skipped()) return;
  const auto rows = rows_by_key(table);
  for (auto at = rows.begin(); at != rows.end();) {
    const uint64_t key = launch_key(**at);
    const auto end =
        std::find_if(at, rows.end(), [&](const auto* row) { return launch_key(*row) != key; });
    if ((*at)->compute == DType::kFloat64) {
      // Never large: its kernels take long to compile, and float64 tensors are rarely many.
      using Small = Launch<Rule, Epilogue, double, kSmallLaunch>;
      while (at != end) at = fill_and_enqueue<Small>(rule, step, epilogue, at, end, enqueue);
    } else {
      using Small = Launch<Rule, Epilogue, float, kSmallLaunch>;
      using Large = Launch<Rule, Epilogue, float, kLargeLaunch>;
      while (at != end) {
        at = allow_large && end - at > static_cast<std::ptrdiff_t>(Small::kCapacity)
                 ? fill_and_enqueue<Large>(rule, step, epilogue, at, end, enqueue)
                 : fill_and_enqueue<Small>(rule, step, epilogue, at, end, enqueue);
      }
    }
  }
}

}  // namespace emopt::cuda
