// Plans the launches of a table: how many there are, and their rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "../table.h"
#include "enqueue_rows.h"
#include "launch.h"

namespace emopt::cuda {

// ---- grouping rows ------------------------------------------------------------------------------

// The device and the dtype of each operand, which all rows of a launch share.
template <int kOperands>
uint64_t launch_key(const Row<kOperands>& row) {
  static_assert(kOperands <= 14, "four bits each, beside a byte");
  uint64_t key = static_cast<uint8_t>(row.device);
  for (int k = 0; k < kOperands; ++k) key = key << 4 | static_cast<uint8_t>(row.dtype[k]);
  return key;
}

// The non-empty rows on CUDA devices, grouped by key, otherwise in order.
template <int kOperands>
std::vector<const void*> rows_by_key(const Table<kOperands>& table) {
  using RowOf = Row<kOperands>;
  std::vector<const void*> rows;
  rows.reserve(table.rows.size());
  for (const RowOf& row : table.rows) {
    if (row.device != kHost && row.numel != 0) rows.push_back(&row);
  }
  const auto is_before = [](const void* a, const void* b) {
    return launch_key(*static_cast<const RowOf*>(a)) < launch_key(*static_cast<const RowOf*>(b));
  };
  if (!std::is_sorted(rows.begin(), rows.end(), is_before)) {
    std::stable_sort(rows.begin(), rows.end(), is_before);
  }
  return rows;
}

// Calls `visit(first_row, rows, num_rows)` for the rows of each key.
template <int kOperands, class Visit>
void for_each_key(const Table<kOperands>& table, Visit visit) {
  const std::vector<const void*> rows = rows_by_key(table);
  const auto row_at = [&](size_t i) -> const Row<kOperands>& {
    return *static_cast<const Row<kOperands>*>(rows[i]);
  };
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    const uint64_t key = launch_key(row_at(begin));
    while (end < rows.size() && launch_key(row_at(end)) == key) ++end;
    visit(row_at(begin), rows.data() + begin, end - begin);
  }
}

// ---- filling launches ---------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The elements of a row that each block sweeps, for `total` elements in a launch. Chosen so that
// blocks fill their waves: a last wave of a few blocks would leave most of the chip idle.
inline uint32_t chunk_for(int64_t total, int64_t blocks_at_a_time) {
  const int64_t times = ceil_div(total, blocks_at_a_time * kMaxChunk);
  return static_cast<uint32_t>(ceil_div(total, times * blocks_at_a_time * kTile)) * kTile;
}

// CUDA's limit on the blocks of a launch. One row cannot exceed it: no memory holds so many chunks.
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

inline uint8_t peel_of(void* const* data, const DType* dtype, int num_operands) {
  for (uint8_t peel = 0; peel < kHeld; ++peel) {
    bool is_aligned = true;
    for (int k = 0; k < num_operands; ++k) {
      const auto size = static_cast<uint32_t>(size_of(dtype[k]));
      const uintptr_t address = reinterpret_cast<uintptr_t>(data[k]) + peel * size;
      is_aligned &= address % vector_bytes(size) == 0;
    }
    if (is_aligned) return peel;
  }
  return kNoPhase;
}

// Whether a row has scalar states on its device: those of a step are where its counter is.
template <class Epilogue, class RowOf>
bool has_scalars(const RowOf& row) {
  return row.scalars() != nullptr && (!Epilogue::kHasRowSteps || row.step != nullptr);
}

// Fills one launch with the first rows of a key and passes it to `enqueue(launch, blocks)`. Returns
// the number of its rows; 0 if `enqueue` failed.
template <class Launch, class Enqueue>
size_t fill_and_enqueue(const typename Launch::Rule& rule, const HostOrDeviceScalar& step,
                        const typename Launch::Epilogue& epilogue, const void* const* rows,
                        size_t num_rows, const Chip& chip, Enqueue& enqueue) {
  using Real = typename Launch::Real;
  constexpr int kOperands = Launch::kOperands;
  const auto row_at = [&](size_t i) -> const Row<kOperands>& {
    return *static_cast<const Row<kOperands>*>(rows[i]);
  };
  Launch launch(rule, step, epilogue, row_at(0).dtype);
  launch.needs_setup =
      step.is_on_device() || epilogue.is_on_device() ||
      (epilogue.is_stochastic && can_round_stochastically(row_at(0).dtype[kUpdate])) ||
      Launch::kHasCodes;
  const size_t most = std::min<size_t>(num_rows, Launch::kCapacity);
  int64_t total = 0;
  for (size_t i = 0; i < most; ++i) {
    total += row_at(i).numel;
    launch.needs_setup |= Launch::Epilogue::kHasRowSteps && row_at(i).step != nullptr;
    launch.needs_setup |= has_scalars<typename Launch::Epilogue>(row_at(i));
  }
  launch.chunk =
      chunk_for(total, int64_t{chip.multiprocessors} * Launch::num_blocks(launch.needs_setup));
  int64_t blocks = 0;
  for (size_t i = 0; i < most; ++i) {
    const Row<kOperands>& row = row_at(i);
    const int64_t chunks = ceil_div(row.numel, launch.chunk);
    if (blocks + chunks > kMaxBlocks && i != 0) break;
    const uint32_t r = launch.num_rows++;
    for (int k = 0; k < kOperands; ++k) launch.data[k][r] = row.data[k];
    launch.numel[r] = row.numel;
    launch.scale[r] = static_cast<Real>(row.scale);
    launch.first_block[r] = static_cast<uint32_t>(blocks);
    launch.peel[r] = peel_of(row.data, row.dtype, kOperands);
    if constexpr (Launch::kHasCodes) {
      if (launch.peel[r] != 0) launch.peel[r] = kNoPhase;  // vectors do not straddle groups
      auto& codes = launch.codes[r];
      std::copy_n(row.extras->scales, std::size(codes.scales), codes.scales);
      codes.place = row.extras->place;
    }
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      static_cast<RowStep&>(launch.steps[r]) = {row.step, row.position, row.first_index};
    }
    if constexpr (kScalarSlots<typename Launch::Rule> != 0) {
      const bool is_there = has_scalars<typename Launch::Epilogue>(row);
      for (uint32_t s = 0; s < kScalarSlots<typename Launch::Rule>; ++s) {
        launch.steps[r].scalars[s] = is_there ? row.scalars()[s] : nullptr;
      }
    }
    blocks += chunks;
  }
  return enqueue(launch, static_cast<uint32_t>(blocks)) ? launch.num_rows : 0;
}

// Passes the rows of a key to `enqueue`, in as few launches as possible, until it returns false.
template <class Rule, class Epilogue, class Real, bool kHasCodes = false, class Enqueue>
void plan_rows(const Rule& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
               const void* const* rows, size_t num_rows, const Chip& chip, Enqueue enqueue) {
  using Small = Launch<Rule, Epilogue, Real, kSmallLaunch, kHasCodes>;
  // Large launches are not worth compiling for float64: such tensors are rarely many.
  constexpr bool kIsFloat = sizeof(Real) == sizeof(float);
  using Large = Launch<Rule, Epilogue, Real, kIsFloat ? kLargeLaunch : kSmallLaunch, kHasCodes>;
  while (num_rows != 0) {
    const bool is_large = chip.takes_large_launches && num_rows > Small::kCapacity;
    const auto fill =
        is_large ? &fill_and_enqueue<Large, Enqueue> : &fill_and_enqueue<Small, Enqueue>;
    const size_t done = fill(rule, step, epilogue, rows, num_rows, chip, enqueue);
    if (done == 0) return;
    rows += done;
    num_rows -= done;
  }
}

// Passes the counters of rows without scalar states to `enqueue(device, advance)`.
template <int kOperands, class Enqueue>
void for_each_advance(const Table<kOperands>& table, const HostOrDeviceScalar& found_inf,
                      Enqueue enqueue) {
  Advance advance{found_inf, 0, {}};
  int8_t device = kHost;
  const auto flush = [&] {
    if (advance.count != 0) enqueue(device, advance);
    advance.count = 0;
  };
  for (const Row<kOperands>& row : table.rows) {
    if (row.step == nullptr || row.scalars() != nullptr) continue;
    if (row.device != device || advance.count == Advance::kCapacity) flush();
    device = row.device;
    advance.counters[advance.count++] = row.step;
  }
  flush();
}

// Passes the rows that have counters and scalar states on a device to `enqueue(device, rows)`.
template <int kOperands, class Enqueue>
void for_each_scalars(const Table<kOperands>& table, Enqueue enqueue) {
  std::map<int8_t, std::vector<RowScalars>> rows;
  for (const Row<kOperands>& row : table.rows) {
    if (row.step == nullptr || row.scalars() == nullptr) continue;
    RowScalars& added = rows[row.device].emplace_back(RowScalars{row.step, {}});
    std::copy(row.scalars(), row.scalars() + kMaxScalarStates, added.scalars);
  }
  for (const auto& [device, on_device] : rows) enqueue(device, on_device);
}

// Passes what advances such rows to `enqueue(launch)`, in as few launches as possible, until it
// returns false.
template <class Rule, class Enqueue>
void plan_advance(const Rule& rule, const HostOrDeviceScalar& step,
                  const HostOrDeviceScalar& found_inf, const RowScalars* rows, size_t num_rows,
                  Enqueue enqueue) {
  using Launch = AdvanceScalars<Rule>;
  Launch launch{rule, step, found_inf, 0, {}};
  for (; num_rows != 0; rows += launch.count, num_rows -= launch.count) {
    launch.count = static_cast<uint32_t>(std::min<size_t>(num_rows, Launch::kCapacity));
    std::copy(rows, rows + launch.count, launch.rows);
    if (!enqueue(launch)) return;
  }
}

// Sweeps a table. `enqueue_key(first_row, rows, num_rows)` enqueues the rows of a key,
// `enqueue_advance(device, advance)` the kernel that advances counters, and
// `enqueue_scalars(device, rows)` that of rows with scalar states.
template <class Epilogue, int kOperands, class EnqueueKey, class EnqueueAdvance,
          class EnqueueScalars>
void sweep_table(const Epilogue& epilogue, const Table<kOperands>& table, EnqueueKey enqueue_key,
                 EnqueueAdvance enqueue_advance, EnqueueScalars enqueue_scalars) {
  // Kernels without a setup do not check whether the step is skipped.
  if (epilogue.is_on_device() || !epilogue.is_skipped()) for_each_key(table, enqueue_key);
  if constexpr (Epilogue::kHasRowSteps) {
    for_each_advance(table, epilogue.found_inf, enqueue_advance);
    for_each_scalars(table, enqueue_scalars);
  }
}

}  // namespace emopt::cuda
