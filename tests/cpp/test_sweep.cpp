// Each instruction set's loops against the rule called element by element. Nothing outside of a row
// is touched: what lies before an operand is compared, and AddressSanitizer knows where it ends.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "engine/cpu/unit.h"

namespace {

void check(emopt::cpu::SweepFunction<emopt::Adam> sweep, std::mt19937_64& random) {
  const emopt::Adam rule{{0.9, 0.999}, true, random() % 2 == 0, 1e-8};
  std::vector<std::vector<Buffer>> rows;
  for (const int64_t numel : {0, 1, 7, 31, 127, 128, 129, 300}) {
    std::vector<Buffer> operands;
    const bool is_uniform = random() % 2 == 0;
    for (int k = 0; k < 4; ++k) {
      const emopt::DType dtype = is_uniform ? emopt::DType::kFloat32 : kTypes[random() % 4];
      operands.emplace_back(dtype, numel, random() % 5, random);
    }
    rows.push_back(std::move(operands));
  }
  std::vector<std::vector<Buffer>> expected = rows;
  emopt::Table<4> table;
  for (size_t r = 0; r < rows.size(); ++r) {
    table.append(row_of<4>(rows[r], r % 2 == 0 ? 1.0 : 0.3));
    apply_by_hand(rule, 3, table.rows.back(), expected[r]);
  }
  const int64_t cut = static_cast<int64_t>(random() % static_cast<uint64_t>(table.numel));
  const auto at = [&](int64_t element) { return place_of(table, element, emopt::cpu::kTile); };
  const emopt::cpu::Steps<emopt::Adam> steps(rule, 3);
  sweep(steps, {}, table, at(0), at(cut));
  sweep(steps, {}, table, at(cut), at(table.numel));
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t k = 0; k < 4; ++k) CHECK(rows[r][k].bytes == expected[r][k].bytes);
  }
}

}  // namespace

int main() {
  for (const emopt::cpu::Isa isa : emopt::cpu::supported_isas()) {
    std::printf("%s\n", emopt::cpu::name(isa));
    emopt::cpu::SweepFunction<emopt::Adam> sweep =
        emopt::cpu::baseline::sweep<emopt::Adam, emopt::StoreUpdate>;
#if EMOPT_X86_UNITS
    if (isa == emopt::cpu::Isa::kAVX2)
      sweep = emopt::cpu::avx2::sweep<emopt::Adam, emopt::StoreUpdate>;
    if (isa == emopt::cpu::Isa::kAVX512)
      sweep = emopt::cpu::avx512::sweep<emopt::Adam, emopt::StoreUpdate>;
#endif
    std::mt19937_64 random(0);
    for (int round = 0; round < 200; ++round) check(sweep, random);
  }
}
