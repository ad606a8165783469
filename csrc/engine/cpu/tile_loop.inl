// The tile machine's loops. Included by for_each_isa.inl.

namespace emopt::cpu::EMOPT_UNIT {

// ---- operations on tiles ------------------------------------------------------------------------

template <TileOp kOp, class Real>
EMOPT_FN Real compute_op([[maybe_unused]] Real a, [[maybe_unused]] Real b,
                         [[maybe_unused]] Real c) {
#define EMOPT_COMPUTE(name, arity, text, expression) \
  if constexpr (kOp == TileOp::name) return expression;
  EMOPT_FOR_EACH_TILE_OP(EMOPT_COMPUTE)
#undef EMOPT_COMPUTE
}

// Bit i of kForm: operand i is a scalar.
template <TileOp kOp, int kForm, class Real>
void operate(Real* to, const Real* a, const Real* b, const Real* c, int64_t n) {
  [[maybe_unused]] const Real a0 = *a, b0 = *b, c0 = *c;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    to[i] = compute_op<kOp>((kForm & 1) != 0 ? a0 : a[i], (kForm & 2) != 0 ? b0 : b[i],
                            (kForm & 4) != 0 ? c0 : c[i]);
  }
}

template <class Real>
using Operate = void (*)(Real*, const Real*, const Real*, const Real*, int64_t);

// The forms of an operation: missing operands are scalars.
template <TileOp kOp, int kArity, class Real>
constexpr Operate<Real> form_of(int form) {
  constexpr int kMissing = kArity == 1 ? 6 : kArity == 2 ? 4 : 0;
  switch (form) {
    case 0:
      return &operate<kOp, 0 | kMissing, Real>;
    case 1:
      return &operate<kOp, 1 | kMissing, Real>;
    case 2:
      return &operate<kOp, 2 | kMissing, Real>;
    case 3:
      return &operate<kOp, 3 | kMissing, Real>;
    case 4:
      return &operate<kOp, 4 | kMissing, Real>;
    case 5:
      return &operate<kOp, 5 | kMissing, Real>;
    case 6:
      return &operate<kOp, 6 | kMissing, Real>;
    default:
      return &operate<kOp, 7, Real>;
  }
}

#define EMOPT_FORMS(name, arity, text, expression)                               \
  {form_of<TileOp::name, arity, Real>(0), form_of<TileOp::name, arity, Real>(1), \
   form_of<TileOp::name, arity, Real>(2), form_of<TileOp::name, arity, Real>(3), \
   form_of<TileOp::name, arity, Real>(4), form_of<TileOp::name, arity, Real>(5), \
   form_of<TileOp::name, arity, Real>(6), form_of<TileOp::name, arity, Real>(7)},
template <class Real>
constexpr Operate<Real> kOperations[static_cast<int>(TileOp::kCount)][8] = {
    EMOPT_FOR_EACH_TILE_OP(EMOPT_FORMS)};
#undef EMOPT_FORMS

// ---- epilogues ----------------------------------------------------------------------------------

template <class EpilogueAt, class Real, class... Weight>
void before(const EpilogueAt& epilogue, Real* to, const Real* grad, int64_t n,
            const Weight*... weight) {
  const EpilogueAt at = epilogue;  // a copy cannot alias what the loop writes
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = at.before(grad[i], weight[i]...);
}

template <bool kWritesWeight, class EpilogueAt, class Real, class... Weight>
void after(const EpilogueAt& epilogue, Real* to, const Real* update, int64_t n, Weight*... weight) {
  const EpilogueAt at = epilogue;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    [[maybe_unused]] Real own[] = {weight[i]..., Real(0)};
    if constexpr (sizeof...(Weight) == 0) {
      to[i] = at.after(update[i]);
    } else {
      to[i] = at.after(update[i], own[0]);
      if constexpr (kWritesWeight) ((weight[i] = own[0]), ...);
    }
  }
}

// ---- the machine --------------------------------------------------------------------------------

// An ElementLoop.
template <class Epilogue, class Real>
void tile_loop(const void* constants, const void* epilogue_at, void* const* operands, int64_t n,
               bool writes_weight) {
  using Step = StepConstants<Real>;
  const Program& program = Step::program_of(constants);
  const TileProgram& code = program.cases[static_cast<size_t>(Step::case_of(program, constants))];
  const auto& epilogue = *static_cast<const typename Epilogue::template At<Real>*>(epilogue_at);
  constexpr bool kHasWeight = Epilogue::kOperands > 0;

  alignas(64) Real buffers[kTileBytes / sizeof(Real) * kTileBuffers];
  const uint32_t num_buffers = code.num_buffers + (kHasWeight ? 1u : 0u);
  const int64_t tile = tile_length<Real>(num_buffers);

  // Locations (program.h). Scalars and literals are only read.
  Real* at[kMaxTileLocations];
  const uint32_t num_states = program.num_states;
  Real* const numbers = const_cast<Real*>(static_cast<const Real*>(constants));
  Real* const literals = const_cast<Real*>(program.literals<Real>());
  for (uint32_t i = program.first_constant(); i < program.first_literal(); ++i) {
    at[i] = numbers + (i - program.first_constant());
  }
  for (uint32_t i = program.first_literal(); i < program.first_buffer(); ++i) {
    at[i] = literals + (i - program.first_literal());
  }
  for (uint32_t i = 0; i < code.num_buffers; ++i) {
    at[program.first_buffer() + i] = buffers + i * tile;
  }

  for (int64_t begin = 0; begin < n; begin += tile) {
    const int64_t length = n - begin < tile ? n - begin : tile;
    const auto operand = [&](uint32_t k) { return static_cast<Real*>(operands[k]) + begin; };
    for (uint32_t s = 0; s < num_states; ++s) at[1 + s] = operand(kFirstState + s);
    Real* const weight = kHasWeight ? operand(kFirstState + num_states) : nullptr;
    if constexpr (kHasWeight) {
      at[0] = buffers + code.num_buffers * tile;
      before(epilogue, at[0], operand(kGrad), length, weight);
    } else {
      at[0] = operand(kGrad);
    }
    for (const TileInstruction& i : code.instructions) {
      kOperations<Real>[i.op][i.form](at[i.to], at[i.a], at[i.b], at[i.c], length);
    }
    if constexpr (!kHasWeight) {
      after<false>(epilogue, operand(kUpdate), at[code.update], length);
    } else if (writes_weight) {
      after<true>(epilogue, operand(kUpdate), at[code.update], length, weight);
    } else {
      after<false>(epilogue, operand(kUpdate), at[code.update], length, weight);
    }
  }
}

}  // namespace emopt::cpu::EMOPT_UNIT
