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
    case DType::kE4M3:
    case DType::kUE5M3:
      std::abort();  // a code needs its scale
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
    case DType::kE4M3:
    case DType::kUE5M3:
      std::abort();  // codes need their scale
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

// ---- codes --------------------------------------------------------------------------------------

template <class Real, class Format>
EMOPT_FN void decode_group(Real* to, const uint8_t* codes, float scale, int64_t n) {
  EMOPT_FIXED_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(Format::decode(codes[i], scale));
}

template <class Real, class Format>
EMOPT_FN uint8_t scale_for_group(const Real* from, int64_t n) {
  int32_t largest = Format::kLowestRank;
  EMOPT_FIXED_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = Format::rank_of(static_cast<float>(from[i]));
    largest = rank > largest ? rank : largest;
  }
  return static_cast<uint8_t>(Format::scale_for(largest));
}

template <class Real, class Format, int kHalf>
EMOPT_FN void encode_group(uint32_t* codes, uint8_t scale, const Real* from, const uint32_t* random,
                           int64_t n) {
  const float reciprocal = reciprocal_of_scale(scale);
  EMOPT_FIXED_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t noise = code_noise(kHalf, random[i]);
    codes[i] = Format::encode(static_cast<float>(from[i]), reciprocal, noise);
  }
}

// The last group of n elements may be short. A length that is known saves the loops' remainders.
template <class Real, class Format>
void decode_with(Real* to, const void* codes, const uint8_t* scales, int64_t offset, int64_t n) {
  const uint8_t* const from = static_cast<const uint8_t*>(codes) + offset;
  scales += offset / kGroup;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    decode_group<Real, Format>(to + i, from + i, scale_of(*scales++), kGroup);
  }
  if (i < n) decode_group<Real, Format>(to + i, from + i, scale_of(*scales), n - i);
}

template <class Real, class Format, int kHalf>
void encode_with(void* codes, uint8_t* scales, int64_t offset, const Real* from, int64_t n,
                 const uint32_t* random) {
  uint8_t* const to = static_cast<uint8_t*>(codes) + offset;
  uint8_t* const to_scales = scales + offset / kGroup;
  const int64_t full = n / kGroup;
  const int64_t rest = n % kGroup;
  // Separate loops: finding a group's largest number takes long, but does not delay the next one's.
  for (int64_t g = 0; g < full; ++g) {
    to_scales[g] = scale_for_group<Real, Format>(from + g * kGroup, kGroup);
  }
  if (rest != 0) to_scales[full] = scale_for_group<Real, Format>(from + full * kGroup, rest);
  uint32_t wide[kTile];  // loops that write bytes would compute with short vectors
  for (int64_t g = 0; g < full; ++g) {
    const int64_t i = g * kGroup;
    encode_group<Real, Format, kHalf>(wide + i, to_scales[g], from + i, random + i, kGroup);
  }
  if (rest != 0) {
    const int64_t i = full * kGroup;
    encode_group<Real, Format, kHalf>(wide + i, to_scales[full], from + i, random + i, rest);
  }
  EMOPT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(wide[i]);
}

template <class Real>
void decode(Real* to, DType dtype, const void* codes, const uint8_t* scales, int64_t offset,
            int64_t n) {
  (dtype == DType::kE4M3 ? &decode_with<Real, E4M3> : &decode_with<Real, UE5M3>)(to, codes, scales,
                                                                                 offset, n);
}

template <class Real>
void encode(DType dtype, void* codes, uint8_t* scales, int64_t offset, const Real* from, int64_t n,
            const uint32_t* random, int state) {
  const auto with = [&](auto half) {
    return dtype == DType::kE4M3 ? &encode_with<Real, E4M3, half> : &encode_with<Real, UE5M3, half>;
  };
  (state % 2 == 0 ? with(std::integral_constant<int, 0>())
                  : with(std::integral_constant<int, 1>()))(codes, scales, offset, from, n, random);
}

inline void fill_random(uint32_t* to, uint64_t key, uint64_t index, int64_t n) {
  while (n != 0) {
    const StateBits bits(key, index);
    const int64_t count = n < bits.count() ? n : bits.count();
    EMOPT_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) to[i] = bits(static_cast<uint32_t>(i));
    to += count;
    index += static_cast<uint64_t>(count);
    n -= count;
  }
}

template <class Real>
inline constexpr Conversions<Real> kConversions = {
    &load<Real>,   &join<Real>,   &store<Real>, &store_stochastically<Real>,
    &decode<Real>, &encode<Real>, &fill_random};

}  // namespace emopt::cpu::EMOPT_UNIT
