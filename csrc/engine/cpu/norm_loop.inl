// The loops that add up a block of a gradient, or find its largest element. Included by
// for_each_isa.inl.

namespace emopt::cpu::EMOPT_UNIT {

// An AddToLanes.
template <class Norm, class Stored>
void add_to_lanes(double* lanes, const void* data, int64_t n, const void* ahead) {
  const Stored* const from = static_cast<const Stored*>(data);
  const Stored* const next = static_cast<const Stored*>(ahead);
  for (int64_t i = 0; i < n; i += kNormLanes) {
    prefetch_lines(next + i, kNormLanes * sizeof(Stored));
    EMOPT_INDEPENDENT_ITERATIONS
    for (int lane = 0; lane < kNormLanes; ++lane) {
      const double x = static_cast<double>(widen(from[i + lane]));
      lanes[lane] = Norm::add(lanes[lane], Norm::term(x));
    }
  }
}

// A FindLargest.
template <class Stored>
double find_largest(const void* data, int64_t n, const void* ahead) {
  using Bits = MagnitudeBits<Stored>;
  const Stored* const from = static_cast<const Stored*>(data);
  const Stored* const next = static_cast<const Stored*>(ahead);
  const auto bits_of = [](Stored x) {
    return static_cast<Bits>(bit_cast<Bits>(x) & std::numeric_limits<Bits>::max());
  };
  constexpr int64_t kChunk = 256 / sizeof(Stored);
  Bits largest[kChunk] = {};
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    prefetch_lines(next + i, 256);
    EMOPT_INDEPENDENT_ITERATIONS
    for (int64_t k = 0; k < kChunk; ++k) {
      const Bits bits = bits_of(from[i + k]);
      largest[k] = bits > largest[k] ? bits : largest[k];
    }
  }
  Bits result = 0;
  for (; i < n; ++i) {
    const Bits bits = bits_of(from[i]);
    result = bits > result ? bits : result;
  }
  for (int64_t k = 0; k < kChunk; ++k) result = largest[k] > result ? largest[k] : result;
  return static_cast<double>(widen(bit_cast<Stored>(result)));
}

template <class Norm>
inline constexpr NormLoops kNormLoops = {
    {&add_to_lanes<Norm, float>, &add_to_lanes<Norm, double>, &add_to_lanes<Norm, BFloat16>,
     &add_to_lanes<Norm, Float16>},
    {&find_largest<float>, &find_largest<double>, &find_largest<BFloat16>, &find_largest<Float16>}};

}  // namespace emopt::cpu::EMOPT_UNIT
