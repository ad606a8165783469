// The roof: how fast a plain loop moves what a rule must move. For each element of each row it
// reads the gradient and what is to be modified, the states and for an optimizer's step the
// parameter; it writes those in place, and an update function's update: ordinary loads and stores,
// one share of the flat range of elements per thread, next to no arithmetic. Like the package, it
// prefetches ahead of long rows.
//
// What it writes to each operand is the mean of the absolute values that it read: that needs every
// one of them, and however often it is repeated the values neither grow nor become subnormal.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerial = 32768;
// Shares are cut at multiples of a cache line.
constexpr int64_t kLine = 16;
// Rows of kLong elements are swept in blocks, which are prefetched kAhead elements ahead.
constexpr int64_t kLong = 4096;
constexpr int64_t kBlock = 64;
constexpr int64_t kAhead = 512;

void prefetch_block(const float* begin) {
  for (int64_t i = 0; i < kBlock; i += kLine) __builtin_prefetch(begin + i);
}

// How many operands are modified, and whether there is an update beside them. The operands of a row
// are the gradient, those that are modified, and the update.
template <int kNumModified, bool kHasUpdate>
struct Operands {
  static constexpr int kSize = 1 + kNumModified + kHasUpdate;

  static void sweep(float* const* operands, int64_t begin, int64_t end) {
    constexpr float kScale = 1.0f / (1 + kNumModified);
    const float* const grad = operands[0];
    float* written[kSize - 1];
    for (int k = 0; k < kSize - 1; ++k) written[k] = operands[1 + k];
    const int64_t block = end - begin < kLong ? end - begin : kBlock;
    for (int64_t from = begin; from < end; from += block) {
      const int64_t next = from + kAhead;
      if (next + block <= end) {
        for (int k = 0; k < kSize; ++k) prefetch_block(operands[k] + next);
      }
      const int64_t to = std::min(from + block, end);
#pragma GCC ivdep
      for (int64_t i = from; i < to; ++i) {
        float sum = std::fabs(grad[i]);
        for (int k = 0; k < kNumModified; ++k) sum += std::fabs(written[k][i]);
        const float mean = sum * kScale;
        for (int k = 0; k < kSize - 1; ++k) written[k][i] = mean;
      }
    }
  }
};

// The elements from `begin` to `end`, counted over all rows.
template <typename Row>
void sweep_share(int64_t num_rows, const int64_t* numel, float* const* operands, int64_t begin,
                 int64_t end) {
  int64_t start = 0;
  for (int64_t row = 0; row < num_rows && start < end; ++row) {
    const int64_t from = std::max<int64_t>(begin - start, 0);
    const int64_t to = std::min(end - start, numel[row]);
    if (from < to) Row::sweep(operands + row * Row::kSize, from, to);
    start += numel[row];
  }
}

template <typename Row>
void sweep(int64_t num_rows, const int64_t* numel, float* const* operands, int num_threads) {
  int64_t total = 0;
  for (int64_t row = 0; row < num_rows; ++row) total += numel[row];
  if (total < kSerial) num_threads = 1;
  const int64_t lines = (total + kLine - 1) / kLine;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int64_t share = (lines + omp_get_num_threads() - 1) / omp_get_num_threads() * kLine;
    const int64_t begin = share * omp_get_thread_num();
    sweep_share<Row>(num_rows, numel, operands, begin, std::min(begin + share, total));
  }
}

}  // namespace

// `operands` holds, row by row, the addresses of the gradient, of what is modified and of the
// update.
extern "C" int roof(int num_modified, bool has_update, int64_t num_rows, const int64_t* numel,
                    float* const* operands, int num_threads) {
  const auto run = [&](auto row) {
    sweep<decltype(row)>(num_rows, numel, operands, num_threads);
    return 0;
  };
  switch (10 * num_modified + has_update) {
    case 11:
      return run(Operands<1, true>());
    case 21:
      return run(Operands<2, true>());
    case 31:
      return run(Operands<3, true>());
    case 20:
      return run(Operands<2, false>());
    case 30:
      return run(Operands<3, false>());
    case 40:
      return run(Operands<4, false>());
    default:
      return 1;
  }
}
