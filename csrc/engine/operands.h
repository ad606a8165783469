// The checked, dtype-erased table of parallel lists: what an engine sweeps.
//
// A row is one tensor's position in the lists; its operands are the update (or the parameter that
// it is applied to), the gradient, the states and what the epilogue adds, all of one length and one
// memory layout, so that element i of each is at index i.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "dtypes.h"
#include "epilogue.h"

namespace emopt {

inline constexpr int kUpdate = 0;
inline constexpr int kGrad = 1;
inline constexpr int kFirstState = 2;

template <class Rule>
inline constexpr int kNumStates = static_cast<int>(std::size(Rule::kStates));

template <class Rule, class Epilogue = StoreUpdate>
inline constexpr int kNumOperands = kFirstState + kNumStates<Rule> + Epilogue::kOperands;

constexpr bool is_read(int k) { return k != kUpdate; }

// Whether operand k of a row is written where it lies, at `data`. A weight that is the parameter
// itself, at `update`, is not: that is written as the parameter.
template <class Epilogue, int kOperands>
EMOPT_FN bool is_written(int k, const void* data, const void* update) {
  return k != kGrad && (k < kOperands - Epilogue::kOperands || data != update);
}

// Whether what became of operand k is to be stored: nothing in place of a parameter that keeps
// every bit, nor of one of its halves. (Another weight then has its own bits.)
template <class EpilogueAt>
EMOPT_FN bool is_stored(int k, DType dtype, const EpilogueAt& epilogue) {
  return epilogue.stores() || (k != kUpdate && dtype != DType::kLowHalf);
}

inline constexpr int8_t kHost = -1;  // in place of a device's index

template <int kOperands>
struct Row {
  void* data[kOperands];
  DType dtype[kOperands];
  DType compute;          // kFloat32, or kFloat64 where an operand that is read is float64
  int8_t device = kHost;  // or the index of a CUDA device
  // Of the random bits: the parameter's number in its optimizer, plus 2^32 times that of a shard
  // with bits of its own; and the index of the first element.
  uint64_t position = 0;
  uint64_t first_index = 0;
  double scale;           // a factor for the update (Signum's shape scaling), else 1
  float* step = nullptr;  // the parameter's counter of done steps, where that is on its device
  int64_t numel;
  int64_t start;  // the number of elements in all earlier rows
};

template <int kOperands>
struct Table {
  std::vector<Row<kOperands>> rows;
  int64_t numel = 0;
  bool any_on_host = false;
  bool any_on_device = false;
  bool any_float64 = false;  // to be computed in

  void append(Row<kOperands> row) {
    row.start = numel;
    numel += row.numel;
    any_on_host |= row.device == kHost;
    any_on_device |= row.device != kHost;
    any_float64 |= row.compute == DType::kFloat64;
    rows.push_back(row);
  }
};

// A place in a table: element `offset` of row `row`.
struct Place {
  int64_t row;
  int64_t offset;
};

// Where a share of the work begins that is cut at the table's element `element`. Cuts fall on
// multiples of `tile`, counted from the first element of a row, whatever the cut that was asked
// for: so each tile is done whole, by one thread.
template <int kOperands>
Place place_of(const Table<kOperands>& table, int64_t element, int64_t tile) {
  const auto& rows = table.rows;
  if (element >= table.numel) return {static_cast<int64_t>(rows.size()), 0};
  // The last row that starts at or before `element`. Empty rows share their start with the next
  // one and come before it, so it is never one of those.
  size_t low = 0, high = rows.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    (rows[middle].start <= element ? low : high) = middle;
  }
  const int64_t offset = element - rows[low].start;
  return {static_cast<int64_t>(low), offset - offset % tile};
}

// Calls `visit(row, begin, end)` for the parts of rows between two places, in order.
template <int kOperands, class Visit>
void for_each_part(const Table<kOperands>& table, Place begin, Place end, Visit visit) {
  for (int64_t r = begin.row; r <= end.row && r < static_cast<int64_t>(table.rows.size()); ++r) {
    const Row<kOperands>& row = table.rows[static_cast<size_t>(r)];
    const int64_t from = r == begin.row ? begin.offset : 0;
    const int64_t to = r == end.row ? end.offset : row.numel;
    if (from < to) visit(row, from, to);
  }
}

}  // namespace emopt
