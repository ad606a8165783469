// The loop that computes a rule and an epilogue for each element. Included by for_each_isa.inl.

namespace emopt::cpu::EMOPT_UNIT {

template <bool kWritesWeight, class Step, class EpilogueAt, class Real, std::size_t... kState,
          std::size_t... kWeight>
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
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    [[maybe_unused]] Real state[] = {states[kState][i]..., Real(0)};
    [[maybe_unused]] Real weight[] = {weights[kWeight][i]..., Real(0)};
    const Real result = step(epilogue.before(grad[i], weight[kWeight]...), state[kState]...);
    update[i] = epilogue.after(result, weight[kWeight]...);
    ((states[kState][i] = state[kState]), ...);
    if constexpr (kWritesWeight) ((weights[kWeight][i] = weight[kWeight]), ...);
  }
}

// An ElementLoop.
template <class Rule, class Epilogue, class Real>
void element_loop(const void* constants, const void* epilogue_at, void* const* operands, int64_t n,
                  bool writes_weight) {
  const auto& step = *static_cast<const typename Rule::template Step<Real>*>(constants);
  const auto& epilogue = *static_cast<const typename Epilogue::template At<Real>*>(epilogue_at);
  constexpr auto kStates = std::make_index_sequence<kNumStates<Rule>>();
  constexpr auto kWeights = std::make_index_sequence<Epilogue::kOperands>();
  if (Epilogue::kOperands > 0 && writes_weight) {
    run<true>(step, epilogue, operands, n, Real(), kStates, kWeights);
  } else {
    run<false>(step, epilogue, operands, n, Real(), kStates, kWeights);
  }
}

}  // namespace emopt::cpu::EMOPT_UNIT
