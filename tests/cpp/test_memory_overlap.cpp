// Memory overlap, against sets of all bytes of the operands.
#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "bindings/memory_overlap.h"
#include "check.h"

using emopt::are_surely_apart;
using emopt::ByteRange;
using emopt::find_sharing;
using emopt::kWorkOfCall;
using emopt::memory_view;
using emopt::MemoryView;
using emopt::self_sharing;
using emopt::Sharing;
using emopt::sharing;
using emopt::UsedMemory;

namespace {

std::mt19937_64 generator(0);
int64_t random(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}

// A tensor at an address that is never read.
struct Strided {
  uintptr_t address;
  int64_t item;
  std::vector<int64_t> sizes, strides;

  MemoryView view() const {
    return memory_view(reinterpret_cast<void*>(address), item, sizes.data(), strides.data(),
                       sizes.size());
  }
  Sharing self() const { return self_sharing(sizes.data(), strides.data(), sizes.size()); }

  std::vector<uintptr_t> items() const {
    std::vector<uintptr_t> result{address};
    for (size_t d = 0; d < sizes.size(); ++d) {
      const std::vector<uintptr_t> so_far = result;
      result.clear();
      for (int64_t i = 0; i < sizes[d]; ++i) {
        for (const uintptr_t start : so_far) {
          result.push_back(start + static_cast<uintptr_t>(i * strides[d] * item));
        }
      }
    }
    return result;
  }
  std::set<uintptr_t> bytes() const {
    std::set<uintptr_t> result;
    for (const uintptr_t start : items()) {
      for (int64_t b = 0; b < item; ++b) result.insert(start + static_cast<uintptr_t>(b));
    }
    return result;
  }
};

Strided random_strided(int64_t reach) {
  Strided tensor{
      static_cast<uintptr_t>(4096 + random(0, reach)), int64_t{1} << random(0, 3), {}, {}};
  for (int64_t d = random(0, 4); d > 0; --d) {
    tensor.sizes.push_back(random(1, 4));
    tensor.strides.push_back(random(0, 1) == 0 ? random(0, 4) : random(0, 24));
  }
  return tensor;
}

bool intersect(const std::set<uintptr_t>& a, const std::set<uintptr_t>& b) {
  return std::any_of(a.begin(), a.end(), [&](uintptr_t byte) { return b.count(byte) != 0; });
}

bool share(const Strided& a, const Strided& b) {
  int64_t work = kWorkOfCall;
  const Sharing result = sharing(a.view(), b.view(), work);
  CHECK(result != Sharing::kUnknown);
  return result == Sharing::kSome;
}

void test_pairs() {
  int num_shared = 0, num_interleaved = 0;
  for (int round = 0; round < 20000; ++round) {
    const Strided a = random_strided(100), b = random_strided(100);
    const bool expected = intersect(a.bytes(), b.bytes());
    CHECK(share(a, b) == expected);
    CHECK(share(b, a) == expected);
    const ByteRange x = a.view().range, y = b.view().range;
    CHECK(x.begin == *a.bytes().begin() && x.end == *a.bytes().rbegin() + 1);
    num_shared += expected;
    num_interleaved += !expected && x.begin < y.end && y.begin < x.end;
  }
  CHECK(num_shared > 2000 && num_interleaved > 2000);
}

void test_self() {
  int num_shared = 0;
  for (int round = 0; round < 20000; ++round) {
    const Strided tensor = random_strided(0);
    std::vector<uintptr_t> items = tensor.items();
    std::sort(items.begin(), items.end());
    const bool expected = std::adjacent_find(items.begin(), items.end()) != items.end();
    CHECK(tensor.self() == (expected ? Sharing::kSome : Sharing::kNone));
    num_shared += expected;
  }
  CHECK(num_shared > 2000 && num_shared < 18000);
}

void test_large() {
  // 2^31 elements and more, too many to enumerate.
  const int64_t huge = int64_t{1} << 31;
  CHECK((Strided{4096, 4, {huge, 2}, {2, 1}}.self() == Sharing::kNone));
  CHECK((Strided{4096, 4, {huge, 2}, {1, 1}}.self() == Sharing::kSome));
  CHECK((Strided{4096, 4, {1 << 16, 1 << 16}, {1, 2}}.self() == Sharing::kSome));
  CHECK((Strided{4096, 4, {1 << 20, 1 << 20}, {1 << 20, (1 << 20) + 1}}.self() == Sharing::kNone));
  CHECK((Strided{4096, 4, {(1 << 20) + 1, (1 << 20) + 2}, {(1 << 20) + 1, 1 << 20}}.self() ==
         Sharing::kSome));
  CHECK((Strided{4096, 4, {1024, 1024, 2048}, {3, 5, 7}}.self() == Sharing::kSome));
  // Even and odd elements; multiples of 2 and of 3.
  CHECK(!share({4096, 4, {huge}, {2}}, {4100, 4, {huge}, {2}}));
  CHECK(share({4096, 4, {huge}, {2}}, {4100, 4, {huge}, {3}}));
  CHECK(share({4096, 8, {huge}, {2}}, {4100, 4, {huge}, {2}}));
  // Coprime strides: after a common element, the next one is 1000003 * 1000033 further.
  CHECK(share({4096, 4, {1000034}, {1000003}}, {4096, 4, {1000004}, {1000033}}));
  const uintptr_t second = 4096 + 4 * 1000003;
  CHECK(share({second, 4, {1000033}, {1000003}}, {4096, 4, {1000004}, {1000033}}));
  CHECK(!share({second, 4, {1000032}, {1000003}}, {4096, 4, {1000004}, {1000033}}));
}

// A search that would take too long gives up early.
void test_limit() {
  std::vector<int64_t> strides, sizes(24, 2);
  int64_t reach = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    strides.push_back(random(int64_t{1} << 30, int64_t{1} << 31));
    reach += strides[d];
  }
  const Strided many{4096, 1, sizes, strides};
  const Strided one{4096 + static_cast<uintptr_t>(reach / 2), 1, {}, {}};
  int64_t work = kWorkOfCall;
  CHECK(sharing(many.view(), one.view(), work) == Sharing::kUnknown);
  CHECK(kWorkOfCall - work <= emopt::kWorkOfPair + 1);
  CHECK(many.self() == Sharing::kUnknown);
}

using Pairs = std::map<std::pair<size_t, size_t>, Sharing>;

Pairs pairs_of(const std::vector<UsedMemory>& used) {
  Pairs pairs;
  find_sharing(used, [&](size_t i, size_t j, Sharing how) {
    CHECK(i < j);
    pairs[{i, j}] = how;
  });
  return pairs;
}

bool are_apart(const std::vector<UsedMemory>& used, size_t count = SIZE_MAX) {
  const auto each_range = [&](auto& visitor) {
    for (const bool is_modified : {true, false}) {
      visitor.start_list();
      for (const UsedMemory& operand : used) {
        if (operand.is_modified != is_modified) continue;
        is_modified ? visitor.modify(operand.view.range) : visitor.read(operand.view.range);
      }
    }
  };
  return are_surely_apart(each_range, count);
}

void test_many() {
  int num_apart = 0;
  for (int round = 0; round < 3000; ++round) {
    // Close together, or so far apart that some cannot overlap.
    const int64_t reach = round % 3 == 0 ? 200 : 5000;
    std::vector<Strided> tensors;
    std::vector<UsedMemory> used;
    for (int64_t n = random(0, 8); n > 0; --n) {
      tensors.push_back(random_strided(reach));
      used.push_back({tensors.back().view(), random(0, 2) != 0});
    }
    Pairs expected;
    for (size_t j = 0; j < used.size(); ++j) {
      for (size_t i = 0; i < j; ++i) {
        if (!used[i].is_modified && !used[j].is_modified) continue;
        if (intersect(tensors[i].bytes(), tensors[j].bytes())) expected[{i, j}] = Sharing::kSome;
      }
    }
    CHECK(pairs_of(used) == expected);
    if (are_apart(used)) CHECK(expected.empty());
    if (are_apart(used, used.size())) CHECK(expected.empty());
    num_apart += are_apart(used);
  }
  CHECK(num_apart > 500);
}

// Ranges of many sizes, with and without an overlap.
void test_surely_apart() {
  for (int round = 0; round < 1000; ++round) {
    std::vector<UsedMemory> used;
    uintptr_t next = 1 << 20;
    for (int64_t n = random(1, 60); n > 0; --n) {
      const int64_t bytes = int64_t{1} << random(2, random(0, 3) == 0 ? 20 : 12);
      used.push_back(
          {emopt::without_gaps({next, next + static_cast<uintptr_t>(bytes)}), random(0, 3) != 0});
      next += static_cast<uintptr_t>((bytes + 63) / 64 * 64 + 64 * random(0, 3));
    }
    std::shuffle(used.begin(), used.end(), generator);
    CHECK(are_apart(used));
    CHECK(are_apart(used, used.size()));
    CHECK(pairs_of(used).empty());
    const auto chosen = static_cast<size_t>(random(0, static_cast<int64_t>(used.size()) - 1));
    const ByteRange range = used[chosen].view.range;
    const auto inside =
        static_cast<uintptr_t>(random(0, static_cast<int64_t>(range.end - range.begin) - 1));
    const ByteRange intruder{range.begin + inside, range.begin + inside + 1 + 64 * inside};
    const size_t place = static_cast<size_t>(random(0, static_cast<int64_t>(used.size())));
    used.insert(used.begin() + static_cast<std::ptrdiff_t>(place),
                {emopt::without_gaps(intruder), true});
    CHECK(!are_apart(used));
    CHECK(!are_apart(used, used.size()));
    CHECK(!pairs_of(used).empty());
  }
}

// Views of one buffer, one after the other, in lists that ascend or descend.
void test_flat_buffers() {
  for (const bool ascends : {true, false}) {
    std::vector<UsedMemory> used;
    uintptr_t next = 4096 + 4;
    for (int i = 0; i < 200; ++i) {
      const auto end = next + 4 * static_cast<uintptr_t>(random(1, 40));
      used.push_back({emopt::without_gaps({next, end}), true});
      next = end;
    }
    if (!ascends) std::reverse(used.begin(), used.end());
    CHECK(are_apart(used));
    // A range that starts one byte early.
    used[100].view.range.begin -= 1;
    used[100].view.run += 1;
    CHECK(!are_apart(used));
    CHECK(pairs_of(used).size() == 1);
  }
  // Ascending and descending in one line.
  const auto at = [](uintptr_t begin, uintptr_t end) {
    return UsedMemory{emopt::without_gaps({4096 + begin, 4096 + end}), true};
  };
  CHECK(!are_apart({at(0, 10), at(20, 30), at(5, 20)}));
  CHECK(!are_apart({at(20, 30), at(0, 10), at(5, 20)}));
}

// A thousand columns of each of three modified matrices and of one that is read.
void test_columns() {
  std::vector<UsedMemory> used;
  for (uintptr_t list = 0; list < 4; ++list) {
    for (uintptr_t column = 0; column < 1000; ++column) {
      const Strided tensor{(1 << 24) * (list + 1) + 4 * column, 4, {1000}, {1000}};
      used.push_back({tensor.view(), list != 3});
    }
  }
  CHECK(!are_apart(used));
  CHECK(pairs_of(used).empty());
  used[2500] = used[2400];
  CHECK((pairs_of(used) == Pairs{{{2400, 2500}, Sharing::kSome}}));
}

}  // namespace

int main() {
  test_pairs();
  test_self();
  test_large();
  test_limit();
  test_many();
  test_surely_apart();
  test_flat_buffers();
  test_columns();
}
