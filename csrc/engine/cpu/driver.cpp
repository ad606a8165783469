#include "driver.h"

namespace emopt::cpu {

namespace {

// One part of one row. Operands that are stored in the arithmetic type are used where they are;
// where all are, the whole part is a single tile.
template <class Epilogue, class Real, int kOperands>
void sweep_part(const Setup<Epilogue>& setup, const Kernel<Epilogue, Real>& kernel,
                const Row<kOperands>& row, int64_t begin, int64_t end) {
  constexpr DType kReal = sizeof(Real) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  alignas(64) Real buffer[kOperands][kTile];
  void* operands[kOperands];
  bool is_staged[kOperands];
  bool any_staged = false;
  auto epilogue = kernel.epilogue;
  for (int k = 0; k < kOperands; ++k) {
    const bool is_kept = k == kUpdate && !epilogue.stores();
    is_staged[k] = row.dtype[k] != kReal || is_kept;
    any_staged |= is_staged[k];
    operands[k] = buffer[k];
  }
  epilogue.scale_by(static_cast<Real>(row.scale));
  bool is_stochastic = false;
  uint64_t key = 0;
  if constexpr (Epilogue::kHasRowSteps) {
    is_stochastic = setup.epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
    if (is_stochastic) {
      const auto step = static_cast<int64_t>(setup.step);
      key = rounding_key(setup.epilogue.seed, row.position, static_cast<uint64_t>(step));
    }
  }
  const auto is_written_there = [&](int k) {
    return is_written<Epilogue, kOperands>(k, row.data[k], row.data[kUpdate]);
  };
  const bool writes_weight = Epilogue::kOperands > 0 && is_written_there(kOperands - 1);
  const Conversions<Real>& convert = *kernel.conversions;
  const int64_t tile = any_staged ? kTile : end - begin;
  for (int64_t offset = begin; offset < end; offset += tile) {
    const int64_t n = end - offset < tile ? end - offset : tile;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k]) {
        operands[k] = static_cast<Real*>(row.data[k]) + offset;
      } else if (row.dtype[k] == DType::kRemainder) {
        convert.join(buffer[k], row.data[kUpdate], row.data[k], offset, n);
      } else if (is_read(k)) {
        convert.load(buffer[k], row.dtype[k], row.data[k], offset, n);
      }
    }
    kernel.loop(kernel.constants, &epilogue, operands, n, writes_weight);
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k] || !is_written_there(k)) continue;
      if (!is_stored(k, row.dtype[k], epilogue)) continue;
      if (k == kUpdate && is_stochastic) {
        const RandomBits random(key, row.first_index + static_cast<uint64_t>(offset));
        convert.store_stochastically(row.dtype[k], row.data[k], offset, buffer[k], n, random);
      } else {
        convert.store(row.dtype[k], row.data[k], offset, buffer[k], n);
      }
    }
  }
}

}  // namespace

template <int kStates, class Epilogue>
void sweep_between(const Setup<Epilogue>& setup,
                   const Table<kNumOperands<kStates, Epilogue>>& table, Place begin, Place end) {
  for_each_part(table, begin, end, [&](const auto& row, int64_t from, int64_t to) {
    if (row.compute == DType::kFloat64) {
      sweep_part(setup, *setup.float64, row, from, to);
    } else {
      sweep_part(setup, setup.float32, row, from, to);
    }
  });
}

#define EMOPT_INSTANTIATE(kStates, Epilogue) \
  template void sweep_between<kStates>(      \
      const Setup<Epilogue>&, const Table<kNumOperands<kStates, Epilogue>>&, Place, Place);
EMOPT_FOR_EACH_SWEEP(EMOPT_INSTANTIATE)

}  // namespace emopt::cpu
