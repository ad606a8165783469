// Index arithmetic: wherever a table is cut, each element is visited once, in full tiles.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "engine/table.h"

using emopt::for_each_part;
using emopt::Place;
using emopt::place_of;
using emopt::Row;
using emopt::Table;

namespace {

Table<3> table_of(const std::vector<int64_t>& sizes) {
  Table<3> table;
  for (const int64_t numel : sizes) {
    Row<3> row{};
    row.numel = numel;
    table.append(row);
  }
  return table;
}

// Visits the table in shares cut at `cuts`, and counts the visits of each element.
void check_cover(const std::vector<int64_t>& sizes, const std::vector<int64_t>& cuts,
                 int64_t tile) {
  const Table<3> table = table_of(sizes);
  std::vector<std::vector<int>> visits;
  for (const int64_t numel : sizes) visits.emplace_back(numel, 0);
  for (size_t share = 0; share + 1 < cuts.size(); ++share) {
    const Place begin = place_of(table, cuts[share], tile);
    const Place end = place_of(table, cuts[share + 1], tile);
    for_each_part(table, begin, end, [&](const Row<3>& row, int64_t from, int64_t to) {
      const auto index = static_cast<size_t>(&row - table.rows.data());
      CHECK(from < to && to <= row.numel);
      CHECK(from % tile == 0);
      CHECK(to % tile == 0 || to == row.numel);
      for (int64_t i = from; i < to; ++i) ++visits[index][static_cast<size_t>(i)];
    });
  }
  for (const auto& row : visits) {
    for (const int count : row) CHECK(count == 1);
  }
}

void test_starts() {
  const Table<3> table = table_of({0, 3, 0, 5, 0});
  CHECK(table.numel == 8);
  const int64_t starts[] = {0, 0, 3, 3, 8};
  for (size_t i = 0; i < 5; ++i) CHECK(table.rows[i].start == starts[i]);
}

void test_places() {
  const Table<3> table = table_of({0, 300, 0, 1, 128, 0});
  const auto is_at = [&](int64_t element, int64_t row, int64_t offset) {
    const Place place = place_of(table, element, 128);
    return place.row == row && place.offset == offset;
  };
  CHECK(is_at(0, 1, 0));
  CHECK(is_at(127, 1, 0));
  CHECK(is_at(128, 1, 128));
  CHECK(is_at(299, 1, 256));
  CHECK(is_at(300, 3, 0));
  CHECK(is_at(301, 4, 0));
  CHECK(is_at(428, 4, 0));
  CHECK(is_at(429, 6, 0));  // past the last row
}

void test_edges() {
  check_cover({}, {0, 0}, 128);
  check_cover({0, 0}, {0, 0}, 128);
  check_cover({1}, {0, 1}, 128);
  for (const int64_t numel : {127, 128, 129, 255, 256, 257}) {
    for (int64_t cut = 0; cut <= numel; ++cut) check_cover({numel}, {0, cut, numel}, 128);
  }
}

void test_large() {
  // Offsets beyond 2^31; no memory is accessed.
  const int64_t large = (int64_t{1} << 33) + 5;
  const Table<3> table = table_of({7, large, 9});
  const Place middle = place_of(table, 7 + large / 2, 128);
  CHECK(middle.row == 1 && middle.offset == large / 2 / 128 * 128);
  int64_t visited = 0;
  for_each_part(table, middle, place_of(table, table.numel, 128),
                [&](const Row<3>&, int64_t from, int64_t to) { visited += to - from; });
  CHECK(visited == large - middle.offset + 9);
}

void test_random() {
  std::mt19937_64 random(0);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int64_t> sizes(random() % 12);
    int64_t total = 0;
    for (int64_t& numel : sizes) {
      numel = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 400);
      total += numel;
    }
    std::vector<int64_t> cuts{0, total};
    for (uint64_t extra = random() % 6; extra > 0; --extra) {
      cuts.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(total + 1)));
    }
    std::sort(cuts.begin(), cuts.end());
    check_cover(sizes, cuts, int64_t{1} << random() % 8);
  }
}

// A weight that is the parameter is written once.
void test_what_is_written() {
  using namespace emopt;
  float here = 0, update = 0;
  for (int k = 0; k < 5; ++k) {
    CHECK((is_written<StoreUpdate, 5>(k, &here, &update) == (k != kGrad)));
    CHECK((is_written<ApplyUpdate, 5>(k, &here, &update) == (k != kGrad)));
    CHECK((is_written<StoreUpdate, 5>(k, &update, &update) == (k != kGrad)));
    // Only the last operand is a weight.
    CHECK((is_written<ApplyUpdate, 5>(k, &update, &update) == (k != kGrad && k != 4)));
  }
}

}  // namespace

int main() {
  test_what_is_written();
  test_starts();
  test_places();
  test_edges();
  test_large();
  test_random();
}
