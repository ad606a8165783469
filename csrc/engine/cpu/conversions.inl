// The conversion loops. Included by for_each_isa.inl.

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

template <class Real>
void load(Real* to, DType dtype, const void* from, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return widen_into<Real, float>(to, from, offset, n);
    case DType::kFloat64:
      return widen_into<Real, double>(to, from, offset, n);
    case DType::kBFloat16:
      return widen_into<Real, BFloat16>(to, from, offset, n);
    case DType::kFloat16:
      return widen_into<Real, Float16>(to, from, offset, n);
    case DType::kSplitParam:
    case DType::kRemainder:
      std::abort();  // a split master needs join()
  }
}

template <class Real>
void join(Real* to, const void* params, const void* remainders, int64_t offset, int64_t n) {
  const SplitParam* param = static_cast<const SplitParam*>(params) + offset;
  const Remainder* remainder = static_cast<const Remainder*>(remainders) + offset;
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(emopt::join(param[i], remainder[i]));
}

template <class Real>
void store(DType dtype, void* to, int64_t offset, const Real* from, int64_t n) {
  switch (dtype) {
    case DType::kFloat32:
      return round_into<Real, float>(to, offset, from, n);
    case DType::kFloat64:
      return round_into<Real, double>(to, offset, from, n);
    case DType::kBFloat16:
      return round_into<Real, BFloat16>(to, offset, from, n);
    case DType::kFloat16:
      return round_into<Real, Float16>(to, offset, from, n);
    case DType::kSplitParam:
      return round_into<Real, SplitParam>(to, offset, from, n);
    case DType::kRemainder:
      return round_into<Real, Remainder>(to, offset, from, n);
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
void store_stochastically(DType dtype, void* to, int64_t offset, const Real* from, int64_t n,
                          const RandomBits& random) {
  if (dtype == DType::kBFloat16) {
    round_stochastically_into<Real, BFloat16>(to, offset, from, n, random);
  } else {
    round_stochastically_into<Real, Float16>(to, offset, from, n, random);
  }
}

template <class Real>
inline constexpr Conversions<Real> kConversions = {&load<Real>, &join<Real>, &store<Real>,
                                                   &store_stochastically<Real>};

}  // namespace emopt::cpu::EMOPT_UNIT
