// The loops that add up a block of a gradient, or find its largest element. Included by
// for_each_isa.inl.

namespace emopt::cpu::EMOPT_UNIT {

// A SumLanes.
template <class Norm, class Stored>
void sum_lanes(double* lanes, const void* data, int64_t n, const Ahead& ahead) {
  const Stored* const from = static_cast<const Stored*>(data);
  const Ahead to_fetch = ahead;  // a copy cannot alias what the loop writes
  for (int lane = 0; lane < kNormLanes; ++lane) lanes[lane] = 0.0;
  for (int64_t i = 0; i < n; i += kNormLanes) {
    prefetch_lines(to_fetch.at(i * int64_t{sizeof(Stored)}), kNormLanes * sizeof(Stored));
    EMOPT_INDEPENDENT_ITERATIONS
    for (int lane = 0; lane < kNormLanes; ++lane) {
      const double x = static_cast<double>(widen(from[i + lane]));
      lanes[lane] = Norm::add(lanes[lane], Norm::term(x));
    }
  }
}

// A FindLargest.
template <class Stored>
double find_largest(const void* data, int64_t n, const Ahead& ahead) {
  using Bits = MagnitudeBits<Stored>;
  const Stored* const from = static_cast<const Stored*>(data);
  const auto bits_of = [](Stored x) {
    return static_cast<Bits>(bit_cast<Bits>(x) & std::numeric_limits<Bits>::max());
  };
  constexpr int64_t kChunk = 256 / sizeof(Stored);
  Bits result = 0;
  int64_t i = 0;
  if (n >= kChunk) {
    Bits largest[kChunk] = {};
    for (; i + kChunk <= n; i += kChunk) {
      prefetch_lines(ahead.at(i * int64_t{sizeof(Stored)}), 256);
      EMOPT_INDEPENDENT_ITERATIONS
      for (int64_t k = 0; k < kChunk; ++k) {
        const Bits bits = bits_of(from[i + k]);
        largest[k] = bits > largest[k] ? bits : largest[k];
      }
    }
    for (const Bits bits : largest) result = bits > result ? bits : result;
  }
  for (; i < n; ++i) {
    const Bits bits = bits_of(from[i]);
    result = bits > result ? bits : result;
  }
  return static_cast<double>(widen(bit_cast<Stored>(result)));
}

#define EMOPT_SUM_LANES(order)                                            \
  {&sum_lanes<NormSum<order>, float>, &sum_lanes<NormSum<order>, double>, \
   &sum_lanes<NormSum<order>, BFloat16>, &sum_lanes<NormSum<order>, Float16>}
inline constexpr NormLoops kNormLoops = {
    {EMOPT_SUM_LANES(NormOrder::kOne), EMOPT_SUM_LANES(NormOrder::kTwo)},
    {&find_largest<float>, &find_largest<double>, &find_largest<BFloat16>, &find_largest<Float16>}};
#undef EMOPT_SUM_LANES

}  // namespace emopt::cpu::EMOPT_UNIT
