// The loops of the CPU engine. Included once by each instruction set's unit, inside its target
// region, with EMOPT_UNIT set to the unit's namespace.

#if defined(__clang__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define EMOPT_INDEPENDENT_ITERATIONS __pragma(loop(ivdep))
#endif

namespace emopt::cpu::EMOPT_UNIT {

template <class Real, class Stored>
void widen_into(Real* to, const void* from, int64_t offset, int64_t n) {
  const Stored* source = static_cast<const Stored*>(from) + offset;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(widen(source[i]));
}

template <class Real, class Stored>
void round_into(void* to, int64_t offset, const Real* from, int64_t n) {
  Stored* target = static_cast<Stored*>(to) + offset;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) target[i] = Round<Stored>::from(from[i]);
}

// Of masters, from their two halves.
template <class Real>
void join_into(Real* to, const void* high, const void* low, int64_t offset, int64_t n) {
  const HighHalf* highs = static_cast<const HighHalf*>(high) + offset;
  const LowHalf* lows = static_cast<const LowHalf*>(low) + offset;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(join(highs[i], lows[i]));
}

// An update may be float64 where the arithmetic is float32, but nothing that is read is.
template <class Real>
void load_tile(Real* to, DType dtype, const void* from, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return widen_into<Real, float>(to, from, offset, n);
    case DType::kFloat64:
      return widen_into<Real, double>(to, from, offset, n);
    case DType::kBFloat16:
      return widen_into<Real, BFloat16>(to, from, offset, n);
    case DType::kFloat16:
      return widen_into<Real, Float16>(to, from, offset, n);
    case DType::kHighHalf:
    case DType::kLowHalf:
      return;  // neither is a number by itself
  }
}

template <class Real>
void store_tile(DType dtype, void* to, int64_t offset, const Real* from, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return round_into<Real, float>(to, offset, from, n);
    case DType::kFloat64:
      return round_into<Real, double>(to, offset, from, n);
    case DType::kBFloat16:
      return round_into<Real, BFloat16>(to, offset, from, n);
    case DType::kFloat16:
      return round_into<Real, Float16>(to, offset, from, n);
    case DType::kHighHalf:
      return round_into<Real, HighHalf>(to, offset, from, n);
    case DType::kLowHalf:
      return round_into<Real, LowHalf>(to, offset, from, n);
  }
}

template <class Real, class Stored>
void round_stochastically_into(void* to, int64_t offset, const Real* from, int64_t n,
                               const RandomBits& of_tile) {
  Stored* target = static_cast<Stored*>(to) + offset;
  const RandomBits random = of_tile;  // a copy cannot alias what the loop writes
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = random(static_cast<uint32_t>(i));
    target[i] = RoundStochastically<Stored>::from(static_cast<float>(from[i]), bits);
  }
}

template <class Real>
void store_tile_stochastically(DType dtype, void* to, int64_t offset, const Real* from, int64_t n,
                               const RandomBits& random) {
  if (dtype == DType::kBFloat16) {
    round_stochastically_into<Real, BFloat16>(to, offset, from, n, random);
  } else {
    round_stochastically_into<Real, Float16>(to, offset, from, n, random);
  }
}

// The one loop that computes. `operands` are in the order of a row. Some may be the same memory: an
// update that is the gradient, a weight that is the parameter, which is then not stored twice.
template <bool kWritesOwn, class Constants, std::size_t... kState, std::size_t... kOwn>
void apply_rule(const Constants& shared, typename Constants::Real* const* operands, int64_t n,
                std::index_sequence<kState...>, std::index_sequence<kOwn...>) {
  using Real = typename Constants::Real;
  const auto step = shared.step;  // copies cannot alias what the loop writes
  const auto epilogue = shared.epilogue;
  Real* const update = operands[kUpdate];
  const Real* const grad = operands[kGrad];
  Real* const states[] = {operands[kFirstState + kState]...};
  [[maybe_unused]] Real* const owns[] = {operands[kFirstState + sizeof...(kState) + kOwn]...,
                                         nullptr};
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    Real state[] = {states[kState][i]...};
    [[maybe_unused]] Real own[] = {owns[kOwn][i]..., Real(0)};
    const Real result = step(epilogue.before(grad[i], own[kOwn]...), state[kState]...);
    update[i] = epilogue.after(result, own[kOwn]...);
    ((states[kState][i] = state[kState]), ...);
    if constexpr (kWritesOwn) ((owns[kOwn][i] = own[kOwn]), ...);
  }
}

// One part of one row. Operands that are stored in the arithmetic type are used where they are;
// where all are, the whole part is a single tile.
template <class Setup, class Constants, int kOperands>
void sweep_part(const Setup& setup, Constants constants, DType real, const Row<kOperands>& row,
                int64_t begin, int64_t end) {
  using Real = typename Constants::Real;
  using Epilogue = typename Setup::Epilogue;
  alignas(64) Real buffer[kOperands][kTile];
  Real* operands[kOperands];
  bool is_staged[kOperands];
  bool any_staged = false;
  for (int k = 0; k < kOperands; ++k) {
    const bool is_kept = k == kUpdate && !constants.epilogue.stores();
    is_staged[k] = row.dtype[k] != real || is_kept;
    any_staged |= is_staged[k];
    operands[k] = buffer[k];
  }
  constants.epilogue.scale_by(static_cast<Real>(row.scale));
  bool is_stochastic = false;
  uint64_t key = 0;
  if constexpr (Epilogue::kHasRowSteps) {
    is_stochastic = setup.epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
    if (is_stochastic) {
      const auto step = static_cast<int64_t>(setup.step);
      key = rounding_key(setup.epilogue.seed, row.position, static_cast<uint64_t>(step));
    }
  }
  const int64_t tile = any_staged ? kTile : end - begin;
  for (int64_t offset = begin; offset < end; offset += tile) {
    const int64_t n = end - offset < tile ? end - offset : tile;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k]) {
        operands[k] = static_cast<Real*>(row.data[k]) + offset;
      } else if (row.dtype[k] == DType::kLowHalf) {
        join_into<Real>(buffer[k], row.data[kUpdate], row.data[k], offset, n);
      } else if (is_read(k)) {
        load_tile<Real>(buffer[k], row.dtype[k], row.data[k], offset, n);
      }
    }
    const auto states = std::make_index_sequence<kNumStates<typename Setup::Rule>>();
    const auto owns = std::make_index_sequence<Epilogue::kOperands>();
    const auto is_written_there = [&](int k) {
      return is_written<Epilogue, kOperands>(k, row.data[k], row.data[kUpdate]);
    };
    if (Epilogue::kOperands > 0 && is_written_there(kOperands - 1)) {
      apply_rule<true>(constants, operands, n, states, owns);
    } else {
      apply_rule<false>(constants, operands, n, states, owns);
    }
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k] || !is_written_there(k)) continue;
      if (!is_stored(k, row.dtype[k], constants.epilogue)) continue;
      if (k == kUpdate && is_stochastic) {
        const RandomBits random(key, row.first_index + static_cast<uint64_t>(offset));
        store_tile_stochastically(row.dtype[k], row.data[k], offset, buffer[k], n, random);
      } else {
        store_tile<Real>(row.dtype[k], row.data[k], offset, buffer[k], n);
      }
    }
  }
}

template <class Rule, class Epilogue>
void sweep(const Setup<Rule, Epilogue>& setup, const Table<kNumOperands<Rule, Epilogue>>& table,
           Place begin, Place end) {
  using RowOf = Row<kNumOperands<Rule, Epilogue>>;
  for_each_part(table, begin, end, [&](const RowOf& row, int64_t from, int64_t to) {
    if (row.compute == DType::kFloat64) {
      sweep_part(setup, *setup.float64, DType::kFloat64, row, from, to);
    } else {
      sweep_part(setup, setup.float32, DType::kFloat32, row, from, to);
    }
  });
}

#define EMOPT_INSTANTIATE_WITH(Rule, Epilogue)                                                  \
  template void sweep(const Setup<Rule, Epilogue>&, const Table<kNumOperands<Rule, Epilogue>>&, \
                      Place, Place);
#define EMOPT_INSTANTIATE(Rule) EMOPT_FOR_EACH_EPILOGUE(EMOPT_INSTANTIATE_WITH, Rule)
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE
#undef EMOPT_INSTANTIATE_WITH

}  // namespace emopt::cpu::EMOPT_UNIT
