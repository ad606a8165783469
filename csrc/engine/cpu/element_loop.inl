// The loop that computes a rule and an epilogue for each element. Included by for_each_isa.inl.

namespace emopt::cpu::EMOPT_UNIT {

// The update of an element, in a case of the rule; kCase is -1 for a rule without cases.
template <int kCase, class Step, class Real, class... State>
EMOPT_FN Real update_of(const Step& step, Real grad, State&... states) {
  if constexpr (kCase < 0) {
    return step(grad, states...);
  } else {
    return step.template compute<kCase>(grad, states...);
  }
}

// Long rows are swept in pieces of a fixed length, which saves the loop's bookkeeping. Over 100000
// elements, in the L2 cache of one Sapphire Rapids core with AVX-512, Lion takes 0.93 of the time
// of a loop of variable length, RMSprop 0.93 to 0.97 and AdamW 0.98 to 1.05
// (benchmarks/compare_builds.py).
constexpr int64_t kLong = 4096;  // elements
constexpr size_t kPieceBytes = EMOPT_PIECE_BYTES;

// Hardware prefetches no further than to the end of a 4 KiB page, so long rows prefetch as well.
constexpr size_t kAheadBytes = 3072;

// A load may be taken for one of what an earlier store has written if the low 12 bits of their
// addresses are the same; it then waits for that store. If any operand is loaded this little below
// another one that is stored, modulo 4096, the loads of a piece would wait for the stores of the
// last one or two. Pieces of four places are then swept in turn: the loads wait for the stores of
// four pieces before, which are done. That costs more than it gains where the row is in the L2
// cache (Sapphire Rapids), and nothing in memory.
constexpr uintptr_t kNearBytes = 192;
constexpr int64_t kFar = 65536;  // elements
constexpr int64_t kPlaces = 4;
constexpr size_t kGroupBytes = 2048;  // four places in these

// The first `num_stored` operands but the gradient are stored; the update is not loaded.
inline bool delays_loads(void* const* operands, int num_operands, int num_stored) {
  const auto address = [&](int k) { return reinterpret_cast<uintptr_t>(operands[k]); };
  for (int stored = 0; stored < num_stored; ++stored) {
    if (stored == kGrad) continue;
    for (int loaded = kGrad; loaded < num_operands; ++loaded) {
      if ((address(stored) - address(loaded) - 1) % 4096 < kNearBytes) return true;
    }
  }
  return false;
}

// Where piece `index` in the order of the sweep is in its group.
constexpr int64_t place_in_group(int64_t index, int64_t num_pieces) {
  return index % kPlaces * (num_pieces / kPlaces) + index / kPlaces;
}

template <int kCase, bool kWritesWeight, class Step, class EpilogueAt, class Real,
          std::size_t... kState, std::size_t... kWeight>
void run(const Step& shared_step, const EpilogueAt& shared_epilogue, void* const* operands,
         int64_t n, Real /*type*/, std::index_sequence<kState...>,
         std::index_sequence<kWeight...>) {
  const Step step = shared_step;  // copies cannot alias what the loop writes
  const EpilogueAt epilogue = shared_epilogue;
  Real* const update = static_cast<Real*>(operands[kUpdate]);
  const Real* const grad = static_cast<const Real*>(operands[kGrad]);
  [[maybe_unused]] Real* const states[] = {static_cast<Real*>(operands[kFirstState + kState])...,
                                           nullptr};
  [[maybe_unused]] Real* const weights[] = {
      static_cast<Real*>(operands[kFirstState + sizeof...(kState) + kWeight])..., nullptr};
  const auto compute = [&](int64_t i) EMOPT_INLINED {
    [[maybe_unused]] Real state[] = {states[kState][i]..., Real(0)};
    [[maybe_unused]] Real weight[] = {weights[kWeight][i]..., Real(0)};
    const Real result =
        update_of<kCase>(step, epilogue.before(grad[i], weight[kWeight]...), state[kState]...);
    update[i] = epilogue.after(result, weight[kWeight]...);
    ((states[kState][i] = state[kState]), ...);
    if constexpr (kWritesWeight) ((weights[kWeight][i] = weight[kWeight]), ...);
  };
  constexpr int64_t kPiece = kPieceBytes / sizeof(Real);
  constexpr int64_t kAhead = kAheadBytes / sizeof(Real);
  constexpr int64_t kGroup = kGroupBytes / sizeof(Real);
  constexpr int kOperands = kFirstState + sizeof...(kState) + sizeof...(kWeight);
  constexpr int kStored = kWritesWeight ? kOperands : kFirstState + sizeof...(kState);
  int64_t i = 0;
  if (n >= kLong) {
    const bool takes_turns =
        kPieceBytes <= 64 && n >= kFar && delays_loads(operands, kOperands, kStored);
    const int64_t turns_end = takes_turns ? n - n % kGroup : 0;
    for (; i + kPiece <= n; i += kPiece) {
      int64_t begin = i;
      if (i < turns_end) {
        constexpr int64_t kPieces = kGroup / kPiece;
        const auto index = static_cast<int64_t>(static_cast<uint64_t>(i / kPiece) % kPieces);
        begin += (place_in_group(index, kPieces) - index) * kPiece;
      }
      const int64_t next = i + kAhead;
      if (next + kPiece <= n) {
        prefetch_lines(grad + next, kPieceBytes);
        (prefetch_lines(states[kState] + next, kPieceBytes), ...);
        (prefetch_lines(weights[kWeight] + next, kPieceBytes), ...);
        // The update takes the weight's place unless both are written.
        if constexpr (kWritesWeight || sizeof...(kWeight) == 0) {
          prefetch_lines(update + next, kPieceBytes);
        }
      }
      EMOPT_FIXED_ITERATIONS
      for (int64_t j = 0; j < kPiece; ++j) compute(begin + j);
    }
  }
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t j = i; j < n; ++j) compute(j);
}

template <int kCase, class Rule, class Epilogue, class Real>
void loop_of_case(const void* constants, const void* epilogue_at, void* const* operands, int64_t n,
                  bool writes_weight) {
  const auto& step = *static_cast<const typename Rule::template Step<Real>*>(constants);
  const auto& epilogue = *static_cast<const typename Epilogue::template At<Real>*>(epilogue_at);
  constexpr auto kStates = std::make_index_sequence<kNumStates<Rule>>();
  constexpr auto kWeights = std::make_index_sequence<Epilogue::kOperands>();
  if (Epilogue::kOperands > 0 && writes_weight) {
    run<kCase, true>(step, epilogue, operands, n, Real(), kStates, kWeights);
  } else {
    run<kCase, false>(step, epilogue, operands, n, Real(), kStates, kWeights);
  }
}

// An ElementLoop. Chooses the step's case outside of the loop over elements.
template <class Rule, class Epilogue, class Real, int kCase = 0>
void element_loop(const void* constants, const void* epilogue_at, void* const* operands, int64_t n,
                  bool writes_weight) {
  if constexpr (kNumCases<Rule> == 0) {
    loop_of_case<-1, Rule, Epilogue, Real>(constants, epilogue_at, operands, n, writes_weight);
  } else {
    const auto& step = *static_cast<const typename Rule::template Step<Real>*>(constants);
    if (kCase + 1 == kNumCases<Rule> || step.which == kCase) {
      loop_of_case<kCase, Rule, Epilogue, Real>(constants, epilogue_at, operands, n, writes_weight);
    } else if constexpr (kCase + 1 < kNumCases<Rule>) {
      element_loop<Rule, Epilogue, Real, kCase + 1>(constants, epilogue_at, operands, n,
                                                    writes_weight);
    }
  }
}

}  // namespace emopt::cpu::EMOPT_UNIT
