// The instruction sets that the CPU engine is compiled for, and the choice between them.
#pragma once

#include <vector>

namespace emopt::cpu {

// In ascending order. `baseline` is the compiler's default target: SSE2 on x86-64, NEON on AArch64.
enum class Isa { kBaseline, kAVX2, kAVX512 };

// Compilers with target regions (GCC, clang) build the x86-64 units; the others build the baseline,
// as all do with -DEMOPT_X86_UNITS=0.
#ifndef EMOPT_X86_UNITS
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define EMOPT_X86_UNITS 1
#else
#define EMOPT_X86_UNITS 0
#endif
#endif

const char* name(Isa isa);

std::vector<Isa> compiled_isas();
// The compiled sets that this machine supports, in ascending order.
std::vector<Isa> supported_isas();

// The set in use: the highest supported one, or the one that EMERGING_OPTIMIZERS_ISA names. Chosen
// once, at the first call. Throws std::runtime_error if the variable's value is not in
// `supported_isas()`.
Isa active_isa();

}  // namespace emopt::cpu
