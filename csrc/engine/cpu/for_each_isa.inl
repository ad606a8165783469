// Includes EMOPT_INCLUDE once for each instruction set, inside its target region, with EMOPT_UNIT
// set to its namespace: out-of-line functions must not be shared between instruction sets. Include
// all other headers before.

#if defined(__clang__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMOPT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define EMOPT_INDEPENDENT_ITERATIONS __pragma(loop(ivdep))
#endif

#define EMOPT_UNIT baseline
#include EMOPT_INCLUDE
#undef EMOPT_UNIT

#if EMOPT_X86_UNITS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define EMOPT_UNIT avx2
#include EMOPT_INCLUDE
#undef EMOPT_UNIT
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define EMOPT_UNIT avx512
#include EMOPT_INCLUDE
#undef EMOPT_UNIT
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#undef EMOPT_INDEPENDENT_ITERATIONS
