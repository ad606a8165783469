// Whether operands share memory, decided from addresses, sizes and strides: two storages may use
// the same memory, and two views of one storage may not overlap. Independent of torch.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "../rules/rule.h"

namespace emopt {

// The bytes [begin, end).
struct ByteRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;
};

inline ByteRange byte_range(const void* address, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  return {begin, begin + static_cast<uintptr_t>(bytes)};
}

// ---- a conservative check, in linear time -------------------------------------------------------

// Marks lines of 64 bytes, in a hash table of blocks of lines. PyTorch aligns memory to 64 bytes or
// more, so tensors that were allocated separately have no line in common, and a table of a few
// kilobytes suffices for a thousand small ones. Sorting their addresses takes several times as
// long.
class LineMarks {
 public:
  LineMarks() : slots_(kFirstSlots) {}

  // Begins another list. Views of a flat buffer share their first and last lines with their
  // neighbours in the list. That is accepted as long as the list's addresses only rise, or only
  // fall.
  void start_list() {
    previous_ = {};
    direction_ = 0;
  }

  // False if the range may overlap an operand that was marked before.
  EMOPT_FN bool mark(ByteRange range) {
    const uint64_t first = range.begin >> kLineBits, last = (range.end - 1) >> kLineBits;
    if (first >> kWordBits == last >> kWordBits) {
      uint64_t& marks = marks_of(first >> kWordBits);
      const uint64_t wanted = (~uint64_t{0} >> (63 - (last - first))) << (first & 63);
      const uint64_t common = marks & wanted;
      if (common == 0 || is_neighbours(first >> kWordBits, common, range)) {
        marks |= wanted;
        previous_ = range;
        return true;
      }
    }
    return mark_words(range);
  }

  EMOPT_FN bool has_marks(ByteRange range) {
    uint64_t marks = 0;
    each_word(range, [&](uint64_t, uint64_t& word, uint64_t wanted) { marks |= word & wanted; });
    return marks != 0;
  }

 private:
  static constexpr int kLineBits = 6;   // 64 bytes
  static constexpr int kWordBits = 6;   // 64 lines in a word
  static constexpr int kBlockBits = 6;  // 64 words in a block: 256 KiB
  static constexpr size_t kFirstSlots = 64;

  using Block = std::array<uint64_t, size_t{1} << kBlockBits>;
  struct Slot {
    uint64_t key = 0;  // the block's number plus 1
    size_t block = 0;
  };

  // Calls `visit(word, marks, wanted)` for each word that has lines of a range.
  template <class Visit>
  EMOPT_FN void each_word(ByteRange range, const Visit& visit) {
    const uint64_t first = range.begin >> kLineBits, last = (range.end - 1) >> kLineBits;
    const uint64_t first_word = first >> kWordBits, last_word = last >> kWordBits;
    const uint64_t head = ~uint64_t{0} << (first & 63), tail = ~uint64_t{0} >> (63 - (last & 63));
    if (first_word == last_word) return visit(first_word, marks_of(first_word), head & tail);
    visit(first_word, marks_of(first_word), head);
    for (uint64_t word = first_word + 1; word < last_word; ++word) {
      visit(word, marks_of(word), ~uint64_t{0});
    }
    visit(last_word, marks_of(last_word), tail);
  }

  // The general case of `mark`.
  bool mark_words(ByteRange range);

  // Whether the only common line is one in which the list's previous range ends or begins. Then all
  // ranges in that line are of this list, in order, and do not overlap.
  bool is_neighbours(uint64_t word, uint64_t common, ByteRange range);

  EMOPT_FN uint64_t& marks_of(uint64_t word) {
    const uint64_t key = (word >> kBlockBits) + 1;
    if (key != last_key_) {
      const Slot& slot = slots_[place_of(key)];
      if (slot.key == key) {
        last_key_ = key;
        last_block_ = blocks_[slot.block].data();
      } else {
        find(key);
      }
    }
    return last_block_[word & ((1 << kBlockBits) - 1)];
  }

  size_t place_of(uint64_t key) const {
    return static_cast<size_t>((key * 0x9e3779b97f4a7c15u) >> shift_);
  }
  // Makes the block of `key` the last one that was used; creates it if needed.
  void find(uint64_t key);
  Slot& slot_of(uint64_t key);
  void grow();

  int shift_ = 58;  // 64 minus the bits of a slot's index
  std::vector<Slot> slots_;
  std::vector<Block> blocks_;
  uint64_t last_key_ = 0;
  uint64_t* last_block_ = nullptr;
  ByteRange previous_;
  int direction_ = 0;
};

// Large ranges. Sorting them is cheap compared with the work on their contents.
class LargeRanges {
 public:
  void add(ByteRange range, bool is_modified) {
    (is_modified ? modified_ : read_).push_back(range);
  }
  bool empty() const { return modified_.empty() && read_.empty(); }

  // Sorts the ranges. False if a modified one intersects another. Call this once, after the last
  // add().
  bool settle();
  // Whether any of them intersects the range, and one of the two is modified.
  bool intersect(ByteRange range, bool is_modified) const {
    return intersects(modified_, range) || (is_modified && intersects(read_, range));
  }

 private:
  static bool intersects(const std::vector<ByteRange>& sorted, ByteRange range);

  std::vector<ByteRange> modified_, read_;  // once settled, disjoint and in order
};

// So few ranges that comparing all pairs is fastest, and needs no allocation.
class FewRanges {
 public:
  static constexpr size_t kMost = 12;

  void start_list() {}
  void modify(ByteRange range) {
    read(range);
    num_modified_ = count_;
  }
  void read(ByteRange range) { ranges_[count_++] = range; }

  bool are_apart() const {
    bool is_certain = true;
    for (size_t i = 0; i < num_modified_; ++i) {
      for (size_t j = i + 1; j < count_; ++j) {
        const bool is_apart =
            ranges_[i].end <= ranges_[j].begin || ranges_[j].end <= ranges_[i].begin;
        is_certain &= is_apart;
      }
    }
    return is_certain;
  }

 private:
  std::array<ByteRange, kMost> ranges_;
  size_t count_ = 0, num_modified_ = 0;
};

// True if certainly no modified range intersects another range. False may only mean that they are
// close together or in an unusual order. `for_each(visitor)` calls `visitor.start_list()` for each
// list, and `visitor.modify(range)` or `visitor.read(range)` for its non-empty ranges; all modified
// ranges come first. There are at most `count` ranges.
template <class ForEach>
bool are_surely_apart(const ForEach& for_each, size_t count) {
  if (count <= FewRanges::kMost) {
    FewRanges few;
    for_each(few);
    return few.are_apart();
  }
  static constexpr uintptr_t kLarge = 1 << 13;
  struct SmallOnes {
    LineMarks marks;
    LargeRanges large;
    bool is_certain = true;

    void start_list() { marks.start_list(); }
    void modify(ByteRange range) {
      if (range.end - range.begin > kLarge) return large.add(range, true);
      is_certain &= marks.mark(range);
    }
    void read(ByteRange range) {
      if (range.end - range.begin > kLarge) return large.add(range, false);
      is_certain &= !marks.has_marks(range);
    }
  };
  struct BesideLargeOnes {
    const LargeRanges& large;
    bool is_certain = true;

    void start_list() {}
    void modify(ByteRange range) { look_at(range, true); }
    void read(ByteRange range) { look_at(range, false); }
    void look_at(ByteRange range, bool is_modified) {
      if (range.end - range.begin > kLarge) return;
      is_certain &= !large.intersect(range, is_modified);
    }
  };
  SmallOnes small;
  for_each(small);
  if (!small.is_certain || small.large.empty()) return small.is_certain;
  if (!small.large.settle()) return false;
  BesideLargeOnes beside{small.large};
  for_each(beside);
  return beside.is_certain;
}

// ---- the exact check ----------------------------------------------------------------------------

// The memory of a tensor: runs of contiguous bytes, at multiples of strides.
struct MemoryView {
  struct Dimension {
    int64_t stride;  // in bytes, greater than the run
    int64_t size;    // greater than 1
  };

  ByteRange range;
  int64_t run = 0;
  std::vector<Dimension> dimensions;  // by stride; empty if there are no gaps

  bool has_gaps() const { return !dimensions.empty(); }
};

inline MemoryView without_gaps(ByteRange range) {
  return {range, static_cast<int64_t>(range.end - range.begin), {}};
}

// Strides are in elements and not negative. The tensor must not be empty.
MemoryView memory_view(const void* address, int64_t item_size, const int64_t* sizes,
                       const int64_t* strides, size_t num_dimensions);

enum class Sharing { kNone, kSome, kUnknown };  // unknown: deciding would take too long

// The number of candidates after which a search gives up; for a call, tens of milliseconds.
inline constexpr int64_t kWorkOfPair = 100'000;
inline constexpr int64_t kWorkOfCall = 4'000'000;

// Whether two tensors have a byte in common. Subtracts its cost from `work`.
Sharing sharing(const MemoryView& a, const MemoryView& b, int64_t& work);

// Whether two indices of a tensor refer to the same element.
Sharing self_sharing(const int64_t* sizes, const int64_t* strides, size_t num_dimensions);

struct UsedMemory {
  MemoryView view;
  bool is_modified;
};

// Calls `found(i, j, how)` for all pairs that share memory, or may share it, if one of the two is
// modified. i < j; a pair may be reported more than once. Interleaved views, such as the columns of
// a matrix, are sorted by their addresses modulo their strides, so that few pairs need a search.
void find_sharing(const std::vector<UsedMemory>& used,
                  const std::function<void(size_t, size_t, Sharing)>& found);

}  // namespace emopt
