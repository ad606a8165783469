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
  }
}

// The one loop that computes. `operands` are in the order of a row; the update may be the gradient.
template <class Real, class Step, std::size_t... kState>
void apply_rule(const Step& shared_step, StoreUpdate<Real> epilogue, Real* const* operands,
                int64_t n, std::index_sequence<kState...>) {
  const Step step = shared_step;  // a copy cannot alias what the loop writes
  Real* const update = operands[kUpdate];
  const Real* const grad = operands[kGrad];
  Real* const states[] = {operands[kFirstState + kState]...};
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    Real state[] = {states[kState][i]...};
    update[i] = epilogue(step(grad[i], state[kState]...));
    ((states[kState][i] = state[kState]), ...);
  }
}

// One part of one row. Operands that are stored in the arithmetic type are used where they are;
// where all are, the whole part is a single tile.
template <class Real, class Step, int kOperands>
void sweep_part(const Step& step, DType real, const Row<kOperands>& row, int64_t begin,
                int64_t end) {
  alignas(64) Real buffer[kOperands][kTile];
  Real* operands[kOperands];
  bool is_staged[kOperands];
  bool any_staged = false;
  for (int k = 0; k < kOperands; ++k) {
    is_staged[k] = row.dtype[k] != real;
    any_staged |= is_staged[k];
    operands[k] = buffer[k];
  }
  const StoreUpdate<Real> epilogue{static_cast<Real>(row.scale)};
  const int64_t tile = any_staged ? kTile : end - begin;
  for (int64_t offset = begin; offset < end; offset += tile) {
    const int64_t n = end - offset < tile ? end - offset : tile;
    for (int k = 0; k < kOperands; ++k) {
      if (!is_staged[k]) {
        operands[k] = static_cast<Real*>(row.data[k]) + offset;
      } else if (k != kUpdate) {
        load_tile<Real>(buffer[k], row.dtype[k], row.data[k], offset, n);
      }
    }
    apply_rule(step, epilogue, operands, n, std::make_index_sequence<kOperands - kFirstState>());
    for (int k = 0; k < kOperands; ++k) {
      if (is_staged[k] && k != kGrad) {
        store_tile<Real>(row.dtype[k], row.data[k], offset, buffer[k], n);
      }
    }
  }
}

template <class Rule>
void sweep(const Steps<Rule>& steps, const Table<kNumOperands<Rule>>& table, Place begin,
           Place end) {
  for_each_part(table, begin, end,
                [&](const Row<kNumOperands<Rule>>& row, int64_t from, int64_t to) {
                  if (row.compute == DType::kFloat64) {
                    sweep_part<double>(steps.float64, DType::kFloat64, row, from, to);
                  } else {
                    sweep_part<float>(steps.float32, DType::kFloat32, row, from, to);
                  }
                });
}

#define EMOPT_INSTANTIATE(Rule) \
  template void sweep<Rule>(const Steps<Rule>&, const Table<kNumOperands<Rule>>&, Place, Place);
EMOPT_FOR_EACH_RULE(EMOPT_INSTANTIATE)
#undef EMOPT_INSTANTIATE

}  // namespace emopt::cpu::EMOPT_UNIT
