#include "memory_overlap.h"

#include <numeric>
#include <optional>

namespace emopt {

namespace {

bool starts_before(ByteRange a, ByteRange b) { return a.begin < b.begin; }

bool intersect(ByteRange a, ByteRange b) { return a.begin < b.end && b.begin < a.end; }

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b > 0 ? 1 : 0); }

// The least t >= 0 with low <= a t mod m <= high, where 0 <= low <= high < m < 2^31 and 0 <= a < m;
// -1 if there is none. Similar to Euclid's algorithm: each recursion halves m.
int64_t first_multiple(int64_t a, int64_t m, int64_t low, int64_t high) {
  if (low == 0) return 0;
  if (a == 0) return -1;
  if (2 * a > m) return first_multiple(m - a, m, m - high, m - low);
  const int64_t t = divide_up(low, a);
  if (t * a <= high) return t;
  const int64_t turns = first_multiple((a - m % a) % a, a, low % a, high % a);
  return turns < 0 ? -1 : divide_up(low + m * turns, a);
}

// Decides whether a sum of terms, each a step times an integer from 0 to a bound, can be in
// [target - slack, target].
class Equation {
 public:
  struct Term {
    int64_t step;
    int64_t bound;
  };

  Equation(std::vector<Term> terms, int64_t slack) : slack_(slack) {
    std::sort(terms.begin(), terms.end(),
              [](const Term& a, const Term& b) { return a.step < b.step; });
    for (const Term& term : terms) {
      if (term.bound == 0) continue;
      if (terms_.empty() && term.step <= slack_ + 1) {
        slack_ += term.step * term.bound;  // no gaps
      } else if (!terms_.empty() && terms_.back().step == term.step) {
        terms_.back().bound += term.bound;
      } else {
        terms_.push_back(term);
      }
    }
    std::reverse(terms_.begin(), terms_.end());
    reach_.assign(terms_.size() + 1, slack_);
    divisor_.assign(terms_.size() + 1, 0);
    for (size_t d = terms_.size(); d-- > 0;) {
      reach_[d] = reach_[d + 1] + terms_[d].step * terms_[d].bound;
      divisor_[d] = std::gcd(divisor_[d + 1], terms_[d].step);
    }
  }

  // Subtracts its cost from `work`.
  Sharing solve(int64_t target, int64_t& work) {
    if (target < 0 || target > reach_[0]) return Sharing::kNone;
    const int64_t before = std::min(work, kWorkOfPair);
    work_ = before;
    const Sharing result = search(0, target);
    work -= before - work_;
    return result;
  }

 private:
  // Uses the terms from the d-th on, from the largest step to the smallest.
  Sharing search(size_t d, int64_t target) {
    if (d == terms_.size()) return Sharing::kSome;
    const int64_t step = terms_[d].step;
    const int64_t excess = target - reach_[d + 1];
    const int64_t last = std::min(terms_[d].bound, target / step);
    for (int64_t x = excess > 0 ? divide_up(excess, step) : 0; x <= last; ++x) {
      x = next_candidate(d, target, x);
      if (x < 0 || x > last) break;
      if (--work_ < 0) return Sharing::kUnknown;
      const Sharing result = search(d + 1, target - x * step);
      if (result != Sharing::kNone) return result;
    }
    return Sharing::kNone;
  }

  // The next x for which the other terms' greatest common divisor permits a solution; -1 if none.
  int64_t next_candidate(size_t d, int64_t target, int64_t x) const {
    const int64_t divisor = divisor_[d + 1];
    if (divisor == 0 || divisor >= int64_t{1} << 31) return x;
    const int64_t rest = (target - x * terms_[d].step) % divisor;
    if (rest <= slack_) return x;
    const int64_t more = first_multiple(terms_[d].step % divisor, divisor, rest - slack_, rest);
    return more < 0 ? -1 : x + more;
  }

  std::vector<Term> terms_;
  int64_t slack_;
  std::vector<int64_t> reach_;    // the largest sum of the terms from the d-th on, plus the slack
  std::vector<int64_t> divisor_;  // the greatest common divisor of their steps
  int64_t work_ = 0;
};

// An operand's addresses, or its addresses modulo a divisor of the strides.
struct Interval {
  uintptr_t begin, end;
  size_t index;
};

// Calls `visit(i, j)` for pairs of intervals that intersect, until it returns false. Skips pairs
// that are both read and, if `with_gaps`, pairs that are both without gaps.
template <class Visit>
bool for_each_pair(const std::vector<UsedMemory>& used, std::vector<Interval> intervals,
                   bool with_gaps, const Visit& visit) {
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<Interval> open[2][2];  // not known to have ended, by is_modified and has_gaps
  for (const Interval& interval : intervals) {
    const UsedMemory& own = used[interval.index];
    for (const bool is_modified : {false, true}) {
      if (!is_modified && !own.is_modified) continue;
      for (const bool has_gaps : {false, true}) {
        if (with_gaps && !has_gaps && !own.view.has_gaps()) continue;
        std::vector<Interval>& others = open[is_modified][has_gaps];
        const auto is_over = [&](const Interval& other) { return other.end <= interval.begin; };
        others.erase(std::remove_if(others.begin(), others.end(), is_over), others.end());
        for (const Interval& other : others) {
          if (!visit(other.index, interval.index)) return false;
        }
      }
    }
    open[own.is_modified][own.view.has_gaps()].push_back(interval);
  }
  return true;
}

// The addresses of some operands modulo a common divisor of their strides.
std::vector<Interval> remainders(const std::vector<UsedMemory>& used,
                                 const std::vector<size_t>& indices, uintptr_t divisor) {
  std::vector<Interval> intervals;
  for (const size_t index : indices) {
    const MemoryView& view = used[index].view;
    const auto run = static_cast<uintptr_t>(view.run);
    const uintptr_t begin = view.range.begin % divisor;
    if (run >= divisor) {
      intervals.push_back({0, divisor, index});
    } else {
      intervals.push_back({begin, std::min(begin + run, divisor), index});
      if (begin + run > divisor) intervals.push_back({0, begin + run - divisor, index});
    }
  }
  return intervals;
}

}  // namespace

// ---- the conservative check ---------------------------------------------------------------------

bool LineMarks::mark_words(ByteRange range) {
  bool is_certain = true;
  each_word(range, [&](uint64_t word, uint64_t& marks, uint64_t wanted) {
    const uint64_t common = marks & wanted;
    if (common != 0) is_certain = is_certain && is_neighbours(word, common, range);
    marks |= wanted;
  });
  previous_ = range;
  return is_certain;
}

bool LineMarks::is_neighbours(uint64_t word, uint64_t common, ByteRange range) {
  const auto is_line_of = [&](uintptr_t address) {
    const uint64_t line = address >> kLineBits;
    return line >> kWordBits == word && common == uint64_t{1} << (line & 63);
  };
  if (direction_ >= 0 && previous_.end != 0 && previous_.end <= range.begin &&
      is_line_of(range.begin) && is_line_of(previous_.end - 1)) {
    direction_ = 1;
    return true;
  }
  if (direction_ <= 0 && range.end <= previous_.begin && is_line_of(range.end - 1) &&
      is_line_of(previous_.begin)) {
    direction_ = -1;
    return true;
  }
  return false;
}

void LineMarks::find(uint64_t key) {
  Slot& slot = slot_of(key);
  if (slot.key != key) {
    slot = {key, blocks_.size()};
    blocks_.emplace_back();
  }
  last_key_ = key;
  last_block_ = blocks_[slot.block].data();
  if (2 * blocks_.size() > slots_.size()) grow();
}

LineMarks::Slot& LineMarks::slot_of(uint64_t key) {
  size_t place = place_of(key);
  while (slots_[place].key != 0 && slots_[place].key != key) {
    place = (place + 1) & (slots_.size() - 1);
  }
  return slots_[place];
}

void LineMarks::grow() {
  std::vector<Slot> old(4 * slots_.size());
  old.swap(slots_);
  shift_ -= 2;
  for (const Slot& slot : old) {
    if (slot.key != 0) slot_of(slot.key) = slot;
  }
}

bool LargeRanges::settle() {
  std::sort(modified_.begin(), modified_.end(), starts_before);
  for (size_t i = 1; i < modified_.size(); ++i) {
    if (modified_[i].begin < modified_[i - 1].end) return false;
  }
  std::sort(read_.begin(), read_.end(), starts_before);
  std::vector<ByteRange> read;
  for (const ByteRange range : read_) {
    if (intersects(modified_, range)) return false;
    if (!read.empty() && range.begin <= read.back().end) {
      read.back().end = std::max(read.back().end, range.end);
    } else {
      read.push_back(range);
    }
  }
  read_ = std::move(read);
  return true;
}

bool LargeRanges::intersects(const std::vector<ByteRange>& sorted, ByteRange range) {
  if (sorted.empty() || range.begin >= sorted.back().end || range.end <= sorted.front().begin) {
    return false;
  }
  const auto after = std::partition_point(
      sorted.begin(), sorted.end(), [&](ByteRange other) { return other.end <= range.begin; });
  return after != sorted.end() && after->begin < range.end;
}

// ---- the exact check ----------------------------------------------------------------------------

MemoryView memory_view(const void* address, int64_t item_size, const int64_t* sizes,
                       const int64_t* strides, size_t num_dimensions) {
  std::vector<MemoryView::Dimension> dimensions;
  int64_t reach = item_size;
  for (size_t d = 0; d < num_dimensions; ++d) {
    if (sizes[d] == 1 || strides[d] == 0) continue;
    dimensions.push_back({strides[d] * item_size, sizes[d]});
    reach += strides[d] * item_size * (sizes[d] - 1);
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const auto& a, const auto& b) { return a.stride < b.stride; });
  MemoryView view{byte_range(address, reach), item_size, {}};
  for (const auto& dimension : dimensions) {
    auto& outer = view.dimensions;
    if (outer.empty() && dimension.stride <= view.run) {
      view.run += dimension.stride * (dimension.size - 1);
    } else if (!outer.empty() && dimension.stride == outer.back().stride * outer.back().size) {
      outer.back().size *= dimension.size;
    } else {
      outer.push_back(dimension);
    }
  }
  return view;
}

Sharing sharing(const MemoryView& a, const MemoryView& b, int64_t& work) {
  if (!intersect(a.range, b.range)) return Sharing::kNone;
  if (!a.has_gaps() && !b.has_gaps()) return Sharing::kSome;
  // They share an address if, with b's offsets counted down from its last byte, a sum of strides of
  // both is the distance from a's first byte to b's last.
  std::vector<Equation::Term> terms;
  for (const MemoryView* view : {&a, &b}) {
    for (const auto& [stride, size] : view->dimensions) terms.push_back({stride, size - 1});
  }
  return Equation(std::move(terms), a.run + b.run - 2)
      .solve(static_cast<int64_t>(b.range.end - 1 - a.range.begin), work);
}

Sharing self_sharing(const int64_t* sizes, const int64_t* strides, size_t num_dimensions) {
  std::vector<MemoryView::Dimension> dimensions;
  for (size_t d = 0; d < num_dimensions; ++d) {
    if (sizes[d] == 0) return Sharing::kNone;
    if (sizes[d] > 1) dimensions.push_back({strides[d], sizes[d]});
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const auto& a, const auto& b) { return a.stride < b.stride; });
  if (!dimensions.empty() && dimensions.front().stride == 0) return Sharing::kSome;
  // If two indices refer to the same element, the dimension of largest stride in which they differ
  // contributes at least one stride to the distance, and the smaller strides cancel it. Each of
  // those contributes between -reach and +reach; the equation counts from the lowest value.
  int64_t reach = 0;
  int64_t work = kWorkOfPair;
  Sharing worst = Sharing::kNone;
  for (size_t d = 0; d < dimensions.size(); ++d) {
    const auto& [stride, size] = dimensions[d];
    if (stride <= reach) {
      std::vector<Equation::Term> terms{{stride, size - 2}};
      for (size_t e = 0; e < d; ++e) {
        terms.push_back({dimensions[e].stride, 2 * (dimensions[e].size - 1)});
      }
      const Sharing result = Equation(std::move(terms), 0).solve(reach - stride, work);
      if (result == Sharing::kSome) return result;
      if (result == Sharing::kUnknown) worst = result;
    }
    reach += stride * (size - 1);
  }
  return worst;
}

void find_sharing(const std::vector<UsedMemory>& used,
                  const std::function<void(size_t, size_t, Sharing)>& found) {
  std::vector<Interval> all, without_gaps;
  for (size_t i = 0; i < used.size(); ++i) {
    const MemoryView& view = used[i].view;
    all.push_back({view.range.begin, view.range.end, i});
    if (!view.has_gaps()) without_gaps.push_back(all.back());
  }
  int64_t work = kWorkOfCall;
  const auto report = [&](size_t i, size_t j, Sharing how) {
    if (--work < 0 && how == Sharing::kNone) how = Sharing::kUnknown;
    if (how != Sharing::kNone) found(std::min(i, j), std::max(i, j), how);
    return work >= 0;
  };
  const bool is_done = for_each_pair(
      used, without_gaps, false, [&](size_t i, size_t j) { return report(i, j, Sharing::kSome); });
  if (!is_done || without_gaps.size() == all.size()) return;

  // Search the others in groups of operands whose ranges overlap.
  std::sort(all.begin(), all.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (size_t first = 0, next = 0; first < all.size(); first = next) {
    std::vector<size_t> group;
    uintptr_t end = all[first].end;
    int64_t divisor = 0;
    for (; next < all.size() && (next == first || all[next].begin < end); ++next) {
      end = std::max(end, all[next].end);
      group.push_back(all[next].index);
      for (const auto& dimension : used[all[next].index].view.dimensions) {
        divisor = std::gcd(divisor, dimension.stride);
      }
    }
    if (group.size() == 1 || divisor == 0) continue;
    const auto decide = [&](size_t i, size_t j) {
      return report(i, j, sharing(used[i].view, used[j].view, work));
    };
    const auto intervals = remainders(used, group, static_cast<uintptr_t>(divisor));
    if (!for_each_pair(used, intervals, true, decide)) return;
  }
}

}  // namespace emopt
