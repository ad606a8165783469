// The table that an engine sweeps: rows of checked operands, which threads share by elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "operands.h"

namespace emopt {

template <int kOperands>
struct Table {
  std::vector<Row<kOperands>> rows;
  int64_t numel = 0;
  bool any_on_host = false;
  bool any_on_device = false;
  bool any_float64 = false;  // as the arithmetic type

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

// The place of the table's element `element`, rounded down to a multiple of `tile` elements from
// the row's start, so that no tile is split between threads.
template <class AnyTable>
Place place_of(const AnyTable& table, int64_t element, int64_t tile) {
  const auto& rows = table.rows;
  if (element >= table.numel) return {static_cast<int64_t>(rows.size()), 0};
  // The last row that starts at or before `element`. It is not empty, since an empty row comes
  // before another row with the same start.
  size_t low = 0, high = rows.size();
  while (high - low > 1) {
    const size_t middle = low + (high - low) / 2;
    (rows[middle].start <= element ? low : high) = middle;
  }
  const int64_t offset = element - rows[low].start;
  return {static_cast<int64_t>(low), offset - offset % tile};
}

// Calls `visit(row, begin, end)` for the elements of each row between two places, in order.
template <class AnyTable, class Visit>
void for_each_part(const AnyTable& table, Place begin, Place end, Visit visit) {
  for (int64_t r = begin.row; r <= end.row && r < static_cast<int64_t>(table.rows.size()); ++r) {
    const auto& row = table.rows[static_cast<size_t>(r)];
    const int64_t from = r == begin.row ? begin.offset : 0;
    const int64_t to = r == end.row ? end.offset : row.numel;
    if (from < to) visit(row, from, to);
  }
}

}  // namespace emopt
