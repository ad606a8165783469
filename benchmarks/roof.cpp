// The roof: how fast a plain loop moves what a rule must move. For each element of each row it
// reads the gradient and the states, and writes the states in place and the update: ordinary loads
// and stores, one share of the flat range of elements per thread, next to no arithmetic.
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

template <int kStates>
void sweep_part(float* const* operands, int64_t begin, int64_t end) {
  constexpr float kScale = 1.0f / (1 + kStates);
  float* const update = operands[0];
  const float* const grad = operands[1];
  float* states[kStates];
  for (int k = 0; k < kStates; ++k) states[k] = operands[2 + k];
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    float sum = std::fabs(grad[i]);
    for (int k = 0; k < kStates; ++k) sum += std::fabs(states[k][i]);
    const float mean = sum * kScale;
    update[i] = mean;
    for (int k = 0; k < kStates; ++k) states[k][i] = mean;
  }
}

// The elements from `begin` to `end`, counted over all rows.
template <int kStates>
void sweep_share(int64_t num_rows, const int64_t* numel, float* const* operands, int64_t begin,
                 int64_t end) {
  int64_t start = 0;
  for (int64_t row = 0; row < num_rows && start < end; ++row) {
    const int64_t from = std::max<int64_t>(begin - start, 0);
    const int64_t to = std::min(end - start, numel[row]);
    if (from < to) sweep_part<kStates>(operands + row * (2 + kStates), from, to);
    start += numel[row];
  }
}

template <int kStates>
void sweep(int64_t num_rows, const int64_t* numel, float* const* operands, int num_threads) {
  int64_t total = 0;
  for (int64_t row = 0; row < num_rows; ++row) total += numel[row];
  if (total < kSerial) num_threads = 1;
  const int64_t lines = (total + kLine - 1) / kLine;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const int64_t share = (lines + omp_get_num_threads() - 1) / omp_get_num_threads() * kLine;
    const int64_t begin = share * omp_get_thread_num();
    sweep_share<kStates>(num_rows, numel, operands, begin, std::min(begin + share, total));
  }
}

}  // namespace

// `operands` holds, row by row, the addresses of the update, the gradient and the states.
extern "C" int roof(int num_states, int64_t num_rows, const int64_t* numel, float* const* operands,
                    int num_threads) {
  switch (num_states) {
    case 1:
      sweep<1>(num_rows, numel, operands, num_threads);
      return 0;
    case 2:
      sweep<2>(num_rows, numel, operands, num_threads);
      return 0;
    case 3:
      sweep<3>(num_rows, numel, operands, num_threads);
      return 0;
    default:
      return 1;
  }
}
