#include "driver.h"

#include <algorithm>

namespace emopt::cpu {

namespace {

// Whether the element loop works on a copy of an operand.
template <class Real, class EpilogueAt, int kOperands>
bool must_stage(const EpilogueAt& epilogue, const Row<kOperands>& row, int k) {
  constexpr DType kReal = sizeof(Real) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  return row.dtype[k] != kReal || (k == kUpdate && !epilogue.stores());
}

template <class Epilogue, int kOperands>
bool is_written_there(const Row<kOperands>& row, int k) {
  return is_written<Epilogue, kOperands>(k, row.data[k], row.data[kUpdate]);
}

template <class Epilogue, class EpilogueAt, int kOperands>
bool writes_weight(const EpilogueAt& epilogue, const Row<kOperands>& row) {
  return Epilogue::kOperands > 0 && epilogue.stores() &&
         is_written_there<Epilogue>(row, kOperands - 1);
}

// Sweeps some elements of a row whose operands are all stored in the arithmetic type.
template <class Epilogue, class Real, int kOperands>
void sweep_in_place(const Kernel<Epilogue, Real>& kernel, const Row<kOperands>& row, int64_t begin,
                    int64_t end) {
  void* operands[kOperands];
  for (int k = 0; k < kOperands; ++k) operands[k] = static_cast<Real*>(row.data[k]) + begin;
  auto epilogue = kernel.epilogue;
  epilogue.scale_by(static_cast<Real>(row.scale));
  kernel.loop(kernel.constants, &epilogue, operands, end - begin,
              writes_weight<Epilogue>(epilogue, row));
}

static_assert(kTile % kGroup == 0, "no group is split between tiles");

template <int kOperands>
bool is_coded(const Row<kOperands>& row, int k) {
  return k >= kFirstState && is_code(row.dtype[k]);
}
template <int kOperands>
uint8_t* scales_of(const Row<kOperands>& row, int k) {
  return row.extras->scales[k - kFirstState];
}

// The random bits of a row's codes, a tile at a time.
class TileRandom {
 public:
  template <int kOperands>
  TileRandom(const Row<kOperands>& row, double step)
      : place_(row.extras != nullptr ? row.extras->place : StatePlace{}),
        step_(static_cast<uint64_t>(static_cast<int64_t>(step))) {}

  // Those of one state, which the next one may share.
  template <class Real>
  const uint32_t* of(int state, int64_t offset, int64_t n, const Conversions<Real>& convert) {
    const uint64_t seed = code_seed(state);
    if (seed != seed_ || offset != offset_) {
      const uint64_t key = rounding_key(seed, place_.position, step_);
      for (int64_t i = 0, count = 0; i < n; i += count) {
        const int64_t at = offset + i;
        count = n - i;
        if (place_.width != 0) count = std::min(count, place_.width - at % place_.width);
        convert.fill_random(bits_ + i, key, place_.index_of(at), count);
      }
      seed_ = seed;
      offset_ = offset;
    }
    return bits_;
  }

 private:
  StatePlace place_;
  uint64_t step_;
  uint64_t seed_ = 0;
  int64_t offset_ = -1;
  alignas(64) uint32_t bits_[kTile];
};

// Sweeps some elements of a row, tile by tile. Operands of another type are staged in buffers.
template <class Epilogue, class Real, int kOperands>
void sweep_tiles(const Setup<Epilogue>& setup, const Kernel<Epilogue, Real>& kernel,
                 const Row<kOperands>& row, int64_t begin, int64_t end) {
  alignas(64) Real buffer[kOperands][kTile];
  void* operands[kOperands];
  bool is_staged[kOperands];
  auto epilogue = kernel.epilogue;
  for (int k = 0; k < kOperands; ++k) {
    is_staged[k] = must_stage<Real>(epilogue, row, k);
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
  TileRandom random(row, setup.step);
  const Conversions<Real>& convert = *kernel.conversions;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int64_t n = end - offset < kTile ? end - offset : kTile;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k]) {
        operands[k] = static_cast<Real*>(row.data[k]) + offset;
      } else if (row.dtype[k] == DType::kRemainder) {
        convert.join(buffer[k], row.data[kUpdate], row.data[k], offset, n);
      } else if (is_coded(row, k)) {
        convert.decode(buffer[k], row.dtype[k], row.data[k], scales_of(row, k), offset, n);
      } else if (is_read(k)) {
        convert.load(buffer[k], row.dtype[k], row.data[k], offset, n);
      }
    }
    kernel.loop(kernel.constants, &epilogue, operands, n, writes_weight<Epilogue>(epilogue, row));
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k] || !is_written_there<Epilogue>(row, k)) continue;
      if (!is_stored<Epilogue, kOperands>(k, epilogue)) continue;
      if (k == kUpdate && is_stochastic) {
        const RandomBits bits(key, row.first_index + static_cast<uint64_t>(offset));
        convert.store_stochastically(row.dtype[k], row.data[k], offset, buffer[k], n, bits);
      } else if (is_coded(row, k)) {
        const int state = k - kFirstState;
        convert.encode(row.dtype[k], row.data[k], scales_of(row, k), offset, buffer[k], n,
                       random.of(state, offset, n, convert), state);
      } else {
        convert.store(row.dtype[k], row.data[k], offset, buffer[k], n);
      }
    }
  }
}

template <class Epilogue, class Real, int kOperands>
void sweep_part(const Setup<Epilogue>& setup, const Kernel<Epilogue, Real>& kernel,
                const Row<kOperands>& row, int64_t begin, int64_t end) {
  bool any_staged = false;
  for (int k = 0; k < kOperands; ++k) any_staged |= must_stage<Real>(kernel.epilogue, row, k);
  if (any_staged) return sweep_tiles(setup, kernel, row, begin, end);
  sweep_in_place(kernel, row, begin, end);
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
