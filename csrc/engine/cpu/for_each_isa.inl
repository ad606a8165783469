// Includes EMOPT_INCLUDE once for each instruction set, inside its target region, with EMOPT_UNIT
// set to its namespace: out-of-line functions must not be shared between instruction sets. Include
// all other headers before.
//
// A unit that is compiled with EMOPT_ONLY_ISA_baseline, EMOPT_ONLY_ISA_avx2 or
// EMOPT_ONLY_ISA_avx512 has only that instruction set.

#if defined(EMOPT_ONLY_ISA_baseline) || defined(EMOPT_ONLY_ISA_avx2) || \
    defined(EMOPT_ONLY_ISA_avx512)
#define EMOPT_ALL_ISAS 0
#else
#define EMOPT_ALL_ISAS 1
#endif
#if EMOPT_ALL_ISAS || defined(EMOPT_ONLY_ISA_baseline)
#define EMOPT_COMPILES_BASELINE 1
#endif
#if EMOPT_X86_UNITS && (EMOPT_ALL_ISAS || defined(EMOPT_ONLY_ISA_avx2))
#define EMOPT_COMPILES_AVX2 1
#endif
#if EMOPT_X86_UNITS && (EMOPT_ALL_ISAS || defined(EMOPT_ONLY_ISA_avx512))
#define EMOPT_COMPILES_AVX512 1
#endif

// Before loops, also before those of a fixed number of iterations, which compilers would rather
// unroll than vectorize; and after a lambda's parameters.
#if defined(__clang__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#define EMOPT_FIXED_ITERATIONS _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#define EMOPT_INLINED __attribute__((always_inline))
#elif defined(__GNUC__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#define EMOPT_FIXED_ITERATIONS _Pragma("GCC unroll 1") _Pragma("GCC ivdep")
#define EMOPT_INLINED __attribute__((always_inline))
#elif defined(_MSC_VER)
#define EMOPT_INDEPENDENT_ITERATIONS __pragma(loop(ivdep))
#define EMOPT_FIXED_ITERATIONS __pragma(loop(ivdep))
#define EMOPT_INLINED
#endif

#if EMOPT_COMPILES_BASELINE
#define EMOPT_UNIT baseline
#define EMOPT_PIECE_BYTES 256
#include EMOPT_INCLUDE
#undef EMOPT_PIECE_BYTES
#undef EMOPT_UNIT
#endif

#if EMOPT_COMPILES_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define EMOPT_UNIT avx2
#define EMOPT_PIECE_BYTES 64
#include EMOPT_INCLUDE
#undef EMOPT_PIECE_BYTES
#undef EMOPT_UNIT
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if EMOPT_COMPILES_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define EMOPT_UNIT avx512
#define EMOPT_PIECE_BYTES 64
#include EMOPT_INCLUDE
#undef EMOPT_PIECE_BYTES
#undef EMOPT_UNIT
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#undef EMOPT_INDEPENDENT_ITERATIONS
#undef EMOPT_FIXED_ITERATIONS
#undef EMOPT_INLINED
