#include "conversions.h"

#include <cstdlib>
#include <type_traits>

#define EMOPT_INCLUDE "conversions.inl"
#include "for_each_isa.inl"
#undef EMOPT_INCLUDE

namespace emopt::cpu {

template <class Real>
const Conversions<Real>& conversions(Isa isa) {
#if EMOPT_X86_UNITS
  if (isa == Isa::kAVX512) return avx512::kConversions<Real>;
  if (isa == Isa::kAVX2) return avx2::kConversions<Real>;
#endif
  static_cast<void>(isa);
  return baseline::kConversions<Real>;
}

template const Conversions<float>& conversions<float>(Isa);
template const Conversions<double>& conversions<double>(Isa);

}  // namespace emopt::cpu
