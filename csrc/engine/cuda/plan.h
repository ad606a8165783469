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
  for (const Row<kOperands>& row : table.rows) {
    if (row.device != kHost && row.numel != 0) rows.push_back(&row);
  }
  const auto is_before = [](const auto* a, const auto* b) {
    return launch_key(*a) < launch_key(*b);
  };
  if (!std::is_sorted(rows.begin(), rows.end(), is_before)) {
    std::stable_sort(rows.begin(), rows.end(), is_before);
  }
  return rows;
}

// What a plan depends on of a device.
struct Chip {
  uint32_t multiprocessors;
  bool takes_large_launches;  // the driver, too, takes more than 4096 bytes of arguments
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a row that each block sweeps, for `total` in a launch. The blocks fill the chip a
// whole number of times: if a few were left over, most of it would be idle while they run.
inline uint32_t chunk_for(int64_t total, int64_t blocks_at_a_time) {
  const int64_t times = ceil_div(total, blocks_at_a_time * kMaxChunk);
  return static_cast<uint32_t>(ceil_div(total, times * blocks_at_a_time * kTile)) * kTile;
}

// A launch has 2^31 - 1 blocks at the most. With a chunk for each, those are more elements than any
// memory holds.
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// Fills one launch with rows from `begin` on, and hands it to `enqueue(device, launch, blocks)`.
// Returns the first row that it has no more room for.
template <class Launch, class Iterator, class Enqueue>
Iterator fill_and_enqueue(const typename Launch::Rule& rule, const Number& step,
                          const typename Launch::Epilogue& epilogue, Iterator begin, Iterator end,
                          const Chip& chip, Enqueue& enqueue) {
  using Real = typename Launch::Real;
  constexpr int kOperands = Launch::kOperands;
  Launch launch(rule, step, epilogue, (*begin)->dtype);
  launch.needs_setup =
      step.is_on_device() || epilogue.is_on_device() ||
      (epilogue.is_stochastic && can_round_stochastically((*begin)->dtype[kUpdate]));
  end = begin + std::min<std::ptrdiff_t>(end - begin, Launch::kCapacity);
  int64_t total = 0;
  for (Iterator at = begin; at != end; ++at) {
    total += (*at)->numel;
    launch.needs_setup |= Launch::Epilogue::kHasRowSteps && (*at)->step != nullptr;
  }
  launch.chunk =
      chunk_for(total, int64_t{chip.multiprocessors} * Launch::num_blocks(launch.needs_setup));
  int64_t blocks = 0;
  Iterator at = begin;
  for (; at != end; ++at) {
    const Row<kOperands>& row = **at;
    const int64_t chunks = ceil_div(row.numel, launch.chunk);
    if (blocks + chunks > kMaxBlocks && at != begin) break;
    const uint32_t r = launch.num_rows++;
    for (int k = 0; k < kOperands; ++k) launch.data[k][r] = row.data[k];
    launch.numel[r] = row.numel;
    launch.scale[r] = static_cast<Real>(row.scale);
    launch.first_block[r] = static_cast<uint32_t>(blocks);
    launch.peel[r] = peel_of(row.data, row.dtype, kOperands);
    if (Launch::Epilogue::kHasRowSteps) {
      launch.steps[r] = {row.step, row.position, row.first_index};
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

// Hands all rows on CUDA devices to `enqueue`, in as few launches as they fit in; `chip_of(device)`
// describes a device.
template <class Rule, class Epilogue, class ChipOf, class Enqueue>
void for_each_launch(const Rule& rule, const Number& step, const Epilogue& epilogue,
                     const Table<kNumOperands<Rule, Epilogue>>& table, ChipOf chip_of,
                     Enqueue enqueue) {
  // Launches that need no setup do not ask whether they are to be skipped.
  if (!epilogue.is_on_device() && epilogue.is_skipped()) return;
  using Small = Launch<Rule, Epilogue, float, kSmallLaunch>;
  using Large = Launch<Rule, Epilogue, float, kLargeLaunch>;
  using Double = Launch<Rule, Epilogue, double, kSmallLaunch>;  // tensors of it are rarely many
  const auto rows = rows_by_key(table);
  for (auto at = rows.begin(); at != rows.end();) {
    const uint64_t key = launch_key(**at);
    const auto end =
        std::find_if(at, rows.end(), [&](const auto* row) { return launch_key(*row) != key; });
    const Chip chip = chip_of((*at)->device);
    const bool is_large =
        chip.takes_large_launches && end - at > static_cast<std::ptrdiff_t>(Small::kCapacity);
    using Rows = decltype(at);
    const auto fill = (*at)->compute == DType::kFloat64 ? &fill_and_enqueue<Double, Rows, Enqueue>
                      : is_large                        ? &fill_and_enqueue<Large, Rows, Enqueue>
                                                        : &fill_and_enqueue<Small, Rows, Enqueue>;
    at = fill(rule, step, epilogue, at, end, chip, enqueue);
  }
}

}  // namespace emopt::cuda
