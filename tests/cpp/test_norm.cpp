// Sums of gradients: every instruction set and the CUDA kernels' code on the host give the same
// bits, and AddressSanitizer reports accesses beyond a gradient.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "engine/cpu/norm.h"
#include "norm_on_host.h"

using namespace emopt;

namespace {

constexpr NormOrder kOrders[] = {NormOrder::kOne, NormOrder::kTwo, NormOrder::kInf};
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Gradients {
  std::vector<Buffer> buffers;
  GradTable table;

  explicit Gradients(std::mt19937_64& random) {
    for (const int64_t numel : {int64_t{1}, int64_t{8}, int64_t{31}, int64_t{32}, int64_t{100},
                                kNormBlock - 1, kNormBlock, kNormBlock + 33, 3 * kNormBlock + 5}) {
      for (const DType dtype : kTypes) buffers.emplace_back(dtype, numel, random() % 9, random);
    }
    std::shuffle(buffers.begin(), buffers.end(), random);
    for (Buffer& buffer : buffers) {
      const auto position = static_cast<int64_t>(table.rows.size());
      table.append({buffer.data(), buffer.dtype, buffer.numel(), position, 0, 0});
    }
  }
};

// Cut into two shares at `cut`.
double sum_on_cpu(NormOrder order, cpu::Isa isa, const GradTable& table, int64_t cut) {
  std::vector<double> block_sums(static_cast<size_t>(table.num_blocks), NAN);
  const auto at = [&](int64_t element) { return place_of(table, element, kNormBlock); };
  cpu::sum_blocks_between(order, isa, table, at(0), at(cut), block_sums.data());
  cpu::sum_blocks_between(order, isa, table, at(cut), at(table.numel), block_sums.data());
  std::vector<double> tensor_sums;
  for (const GradRow& row : table.rows) {
    tensor_sums.push_back(
        cpu::add_blocks(order, block_sums.data() + row.first_block, num_norm_blocks(row.numel)));
  }
  return cpu::add_tensors(order, tensor_sums.data(), static_cast<int64_t>(tensor_sums.size()));
}

double sum_on_device(NormOrder order, const GradTable& table, bool allow_large) {
  std::vector<double> block_sums(static_cast<size_t>(table.num_blocks), NAN);
  std::vector<double> tensor_sums(table.rows.size(), NAN);
  cuda::plan_norm({order, 0, 0, block_sums.data(), tensor_sums.data()}, table, {2, allow_large},
                  [](const auto& launch) {
                    run_on_host(launch);
                    return true;
                  });
  return with_one_nan(
      add_in_order(order, 0.0, tensor_sums.data(), static_cast<int64_t>(tensor_sums.size())));
}

bool same_bits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

void test_bits() {
  std::mt19937_64 random(0);
  for (int round = 0; round < 20; ++round) {
    Gradients grads(random);
    const double special = round % 4 == 1 ? NAN : round % 4 == 2 ? INFINITY : -3.0;
    Buffer& buffer = grads.buffers[random() % grads.buffers.size()];
    buffer.put(static_cast<int64_t>(random()) & (buffer.numel() - 1), special);
    for (const NormOrder order : kOrders) {
      const double wanted = sum_on_cpu(order, cpu::Isa::kBaseline, grads.table, 0);
      CHECK(round % 4 != 1 || std::isnan(wanted));
      CHECK(round % 4 == 1 || wanted > 0);
      for (const cpu::Isa isa : cpu::supported_isas()) {
        const auto cut = static_cast<int64_t>(random() % static_cast<uint64_t>(grads.table.numel));
        CHECK(same_bits(sum_on_cpu(order, isa, grads.table, cut), wanted));
      }
      for (const bool allow_large : {false, true}) {
        CHECK(same_bits(sum_on_device(order, grads.table, allow_large), wanted));
      }
    }
  }
}

template <class Launch>
constexpr bool is_full() {
  static_assert(std::is_trivially_copyable_v<Launch>);
  static_assert(sizeof(Launch) <= Launch::kBytes);
  return sizeof(Launch) + Launch::kRowBytes + 2 * alignof(void*) > Launch::kBytes;
}
static_assert(is_full<cuda::SmallNormLaunch>() && is_full<cuda::LargeNormLaunch>());

// Each row is in one launch, and launches are as few as possible.
void test_launches() {
  constexpr uint32_t kSmall = cuda::SmallNormLaunch::kCapacity;
  constexpr uint32_t kLarge = cuda::LargeNormLaunch::kCapacity;
  for (const bool allow_large : {false, true}) {
    for (const uint32_t num_rows : {0u, 1u, kSmall, kSmall + 1, kLarge, kLarge + 1, 3000u}) {
      GradTable table;
      for (uint32_t r = 0; r < num_rows; ++r) {
        const auto numel = static_cast<int64_t>(1 + r % 3 * kNormBlock);
        table.append({nullptr, DType::kFloat32, numel, int64_t{num_rows} - 1 - r, 0, 0});
      }
      uint32_t launches = 0, done = 0;
      std::vector<double> sums(static_cast<size_t>(table.num_blocks));
      cuda::plan_norm({NormOrder::kTwo, 0, 0, sums.data(), sums.data()}, table, {2, allow_large},
                      [&](const auto& launch) {
                        uint32_t block = 0;
                        for (uint32_t r = 0; r < launch.num_rows; ++r, ++done) {
                          const GradRow& row = table.rows[done];
                          CHECK(launch.numel[r] == row.numel);
                          CHECK(launch.position[r] == row.position);
                          CHECK(launch.first_block[r] == block);
                          CHECK(launch.num_blocks_of(r) == num_norm_blocks(row.numel));
                          for (uint32_t b = launch.num_blocks_of(r); b > 0; --b) {
                            CHECK(launch.row_of(block++) == r);
                          }
                        }
                        CHECK(launch.num_blocks == block);
                        ++launches;
                        return true;
                      });
      CHECK(done == num_rows);
      const uint32_t most = allow_large && num_rows > kSmall ? kLarge : kSmall;
      CHECK(launches == (num_rows + most - 1) / most);
    }
  }
}

}  // namespace

int main() {
  test_bits();
  test_launches();
}
