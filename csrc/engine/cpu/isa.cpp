#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace emopt::cpu {

namespace {

bool is_supported(Isa isa) {
#if EMOPT_X86_UNITS
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAVX2:
      return __builtin_cpu_supports("avx2");
    case Isa::kAVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa choose_isa() {
  const std::vector<Isa> supported = supported_isas();
  const char* wanted = std::getenv("EMERGING_OPTIMIZERS_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported.back();
  std::string names;
  for (const Isa isa : supported) {
    if (wanted == std::string(name(isa))) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::runtime_error("EMERGING_OPTIMIZERS_ISA is '" + std::string(wanted) +
                           "'; expected one that this build and machine support: " + names);
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAVX2:
      return "avx2";
    case Isa::kAVX512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
#if EMOPT_X86_UNITS
  return {Isa::kBaseline, Isa::kAVX2, Isa::kAVX512};
#else
  return {Isa::kBaseline};
#endif
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported;
  for (const Isa isa : compiled_isas()) {
    if (is_supported(isa)) supported.push_back(isa);
  }
  return supported;
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace emopt::cpu
