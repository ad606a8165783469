// Each instruction set's loops against the rule called element by element. Nothing outside of a row
// is touched: what lies before an operand is compared, and AddressSanitizer knows where it ends.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "engine/cpu/unit.h"

using emopt::DType;

namespace {

size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// An operand at an odd place in a buffer that AddressSanitizer knows the ends of.
struct Buffer {
  std::vector<unsigned char> bytes;
  size_t offset;
  DType dtype;

  Buffer(DType dtype_, int64_t numel, size_t elements_before, std::mt19937_64& random)
      : bytes((static_cast<size_t>(numel) + elements_before) * size_of(dtype_)),
        offset(elements_before * size_of(dtype_)),
        dtype(dtype_) {
    for (int64_t i = 0; i < numel; ++i) {
      const double x = static_cast<double>(random() % 20001) / 10000.0;
      put(i, x);
    }
  }
  void* data() { return bytes.data() + offset; }
  double get(int64_t i) const {
    const unsigned char* at = bytes.data() + offset + static_cast<size_t>(i) * size_of(dtype);
    switch (dtype) {
      case DType::kFloat32: {
        float x;
        std::memcpy(&x, at, 4);
        return x;
      }
      case DType::kFloat64: {
        double x;
        std::memcpy(&x, at, 8);
        return x;
      }
      case DType::kBFloat16: {
        emopt::BFloat16 x;
        std::memcpy(&x, at, 2);
        return emopt::widen(x);
      }
      case DType::kFloat16: {
        emopt::Float16 x;
        std::memcpy(&x, at, 2);
        return emopt::widen(x);
      }
    }
    return 0;
  }
  template <class Real>
  void put(int64_t i, Real value) {
    unsigned char* at = bytes.data() + offset + static_cast<size_t>(i) * size_of(dtype);
    switch (dtype) {
      case DType::kFloat32: {
        const auto x = emopt::Round<float>::from(value);
        std::memcpy(at, &x, 4);
        break;
      }
      case DType::kFloat64: {
        const auto x = emopt::Round<double>::from(value);
        std::memcpy(at, &x, 8);
        break;
      }
      case DType::kBFloat16: {
        const auto x = emopt::Round<emopt::BFloat16>::from(value);
        std::memcpy(at, &x, 2);
        break;
      }
      case DType::kFloat16: {
        const auto x = emopt::Round<emopt::Float16>::from(value);
        std::memcpy(at, &x, 2);
        break;
      }
    }
  }
};

template <class Real, class Step>
void apply_by_hand(const Step& step, double scale, std::vector<Buffer>& operands, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    const Real grad = static_cast<Real>(operands[1].get(i));
    Real a = static_cast<Real>(operands[2].get(i));
    Real b = static_cast<Real>(operands[3].get(i));
    const Real update = step(grad, a, b) * static_cast<Real>(scale);
    operands[2].put(i, a);
    operands[3].put(i, b);
    operands[0].put(i, update);
  }
}

void check(emopt::cpu::SweepFunction<emopt::Adam> sweep, std::mt19937_64& random) {
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  const emopt::Adam rule{{0.9, 0.999}, true, random() % 2 == 0, 1e-8};
  const emopt::cpu::Steps<emopt::Adam> steps(rule, 3);
  std::vector<std::vector<Buffer>> rows;
  emopt::Table<4> table;
  for (const int64_t numel : {0, 1, 7, 31, 127, 128, 129, 300}) {
    std::vector<Buffer> operands;
    const bool is_uniform = random() % 2 == 0;
    for (int k = 0; k < 4; ++k) {
      const DType dtype = is_uniform ? DType::kFloat32 : kTypes[random() % 4];
      operands.emplace_back(dtype, numel, random() % 5, random);
    }
    rows.push_back(std::move(operands));
  }
  std::vector<std::vector<Buffer>> expected = rows;
  for (size_t r = 0; r < rows.size(); ++r) {
    emopt::Row<4> row{};
    row.compute = DType::kFloat32;
    row.scale = r % 2 == 0 ? 1.0 : 0.3;
    row.numel = static_cast<int64_t>((rows[r][0].bytes.size() - rows[r][0].offset) /
                                     size_of(rows[r][0].dtype));
    for (size_t k = 0; k < 4; ++k) {
      row.data[k] = rows[r][k].data();
      row.dtype[k] = rows[r][k].dtype;
      if (k > 0 && row.dtype[k] == DType::kFloat64) row.compute = DType::kFloat64;
    }
    table.append(row);
    if (row.compute == DType::kFloat64) {
      apply_by_hand<double>(steps.float64, row.scale, expected[r], row.numel);
    } else {
      apply_by_hand<float>(steps.float32, row.scale, expected[r], row.numel);
    }
  }
  const int64_t cut = static_cast<int64_t>(random() % static_cast<uint64_t>(table.numel));
  const auto at = [&](int64_t element) { return place_of(table, element, emopt::cpu::kTile); };
  sweep(steps, table, at(0), at(cut));
  sweep(steps, table, at(cut), at(table.numel));
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t k = 0; k < 4; ++k) CHECK(rows[r][k].bytes == expected[r][k].bytes);
  }
}

}  // namespace

int main() {
  for (const emopt::cpu::Isa isa : emopt::cpu::supported_isas()) {
    std::printf("%s\n", emopt::cpu::name(isa));
    emopt::cpu::SweepFunction<emopt::Adam> sweep = emopt::cpu::baseline::sweep<emopt::Adam>;
#if EMOPT_X86_UNITS
    if (isa == emopt::cpu::Isa::kAVX2) sweep = emopt::cpu::avx2::sweep<emopt::Adam>;
    if (isa == emopt::cpu::Isa::kAVX512) sweep = emopt::cpu::avx512::sweep<emopt::Adam>;
#endif
    std::mt19937_64 random(0);
    for (int round = 0; round < 200; ++round) check(sweep, random);
  }
}
