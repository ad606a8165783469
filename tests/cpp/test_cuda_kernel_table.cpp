// The table of the kernels that are compiled at run time.
#include <set>

#include "check.h"
#include "engine/cuda/kernel_table.h"

using namespace emopt::cuda;

namespace {

bool is_same(KernelKey a, KernelKey b) {
  return a.epilogue == b.epilogue && a.precision == b.precision && a.is_large == b.is_large &&
         a.needs_setup == b.needs_setup && a.has_codes == b.has_codes;
}

void check_keys() {
  std::set<size_t> indices;
  for (const int epilogue : {0, 1}) {
    for (const int precision : {0, 1}) {
      for (const bool is_large : {false, true}) {
        for (const bool needs_setup : {false, true}) {
          const KernelKey key{epilogue, precision, is_large, needs_setup};
          CHECK(key.index() < KernelKey::kCount);
          CHECK(is_same(KernelKey::at(key.index()), key));
          indices.insert(key.index());
        }
      }
    }
  }
  for (const KernelKey key :
       {KernelKey::advance(), KernelKey::codes(false), KernelKey::codes(true)}) {
    CHECK(is_same(KernelKey::at(key.index()), key));
    indices.insert(key.index());
  }
  CHECK(indices.size() == KernelKey::kCount);
}

void check_wanted(KernelTable& table) {
  const KernelKey first{1, 0, false, true}, second{0, 1, false, false};
  CHECK(table.take_wanted().empty());
  CHECK(!table.has(3, first));
  CHECK(!table.has(3, first));
  CHECK(!table.has(0, second));
  const auto wanted = table.take_wanted();
  CHECK(wanted.size() == 2);
  CHECK(wanted[0].device == 0 && is_same(wanted[0].key, second));
  CHECK(wanted[1].device == 3 && is_same(wanted[1].key, first));
  CHECK(table.take_wanted().empty());
}

void check_added(KernelTable& table) {
  int kernel = 0;
  const KernelKey key{1, 0, false, true};
  table.add(127, key, &kernel);
  CHECK(table.find(127, key) == &kernel && table.has(127, key));
  CHECK(table.find(126, key) == nullptr);
  CHECK(table.find(127, {1, 0, false, false}) == nullptr);
  CHECK(table.take_wanted().empty());
}

// A launch may need any of the small kernels that are there.
void check_large(KernelTable& table) {
  int kernel = 0;
  const auto has_large = [&] { return table.has_large(5, {0, 0, false, false}); };
  table.add(5, {0, 0, false, false}, &kernel);
  CHECK(!has_large());
  table.add(5, {0, 0, true, false}, &kernel);
  CHECK(has_large());
  table.add(5, {0, 0, false, true}, &kernel);
  CHECK(!has_large());
  table.add(5, {0, 0, true, true}, &kernel);
  CHECK(has_large());
  // With codes, there is one of each.
  const auto has_large_codes = [&] { return table.has_large(5, KernelKey::codes(false)); };
  table.add(5, KernelKey::codes(false), &kernel);
  CHECK(!has_large_codes());
  table.add(5, KernelKey::codes(true), &kernel);
  CHECK(has_large_codes());
}

}  // namespace

int main() {
  check_keys();
  KernelTable table;
  check_wanted(table);
  check_added(table);
  check_large(table);
}
