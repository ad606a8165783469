// The numbers that a chip decides. None has been measured on one yet: the reasons are estimates
// from the machine code and a bandwidth of 4.3 TB/s (H200). benchmarks/cuda sets the macros.
#pragma once

#include <cstddef>
#include <cstdint>

// Arrays that loops of a known length run over stay in registers only where those are unrolled.
#if defined(__CUDACC__)
#define EMOPT_UNROLL _Pragma("unroll")
#else
#define EMOPT_UNROLL
#endif

namespace emopt::cuda {

// Elements of each operand that a thread holds at a time, side by side: one vector of float32, half
// a vector of a 2-byte type (with which a warp still reads 256 bytes in a row), two of float64.
// Eight would need twice the registers: the same bytes in flight, by half of the warps.
#ifndef EMOPT_HELD
#define EMOPT_HELD 4
#endif
inline constexpr uint32_t kHeld = EMOPT_HELD;

// Threads of a block, and elements that they hold together.
inline constexpr uint32_t kThreads = 256;
inline constexpr uint32_t kTile = kThreads * kHeld;

// Blocks that a multiprocessor holds at a time, which bounds the registers of a thread: four to 64.
// Adam in float32 then has 64 KiB in flight on each, twice of what 132 of them need to cover a
// microsecond. One less (80 registers) where the constants take registers because a block computes
// them, and where a sixth operand does, of which a thread has more in flight; half for float64.
#ifndef EMOPT_BLOCKS
#define EMOPT_BLOCKS 4
#endif
inline constexpr int kBlocks = EMOPT_BLOCKS;

// The most elements that a block sweeps. Its start (finding its row, a few hundred cycles) is then
// some percent of its time; with more, the last blocks of a launch would end further apart.
#ifndef EMOPT_MAX_CHUNK
#define EMOPT_MAX_CHUNK 8
#endif
inline constexpr uint32_t kMaxChunk = EMOPT_MAX_CHUNK * kTile;

// Neither is set. EMOPT_STREAMING tells caches that nobody wants the data again soon: expected are
// 1 to 2 percent where operands are larger than the L2 cache, a loss where they are found there.
// With EMOPT_PREFETCH, a thread loads its next elements before it computes the present ones:
// expected is nothing, as other warps fill that time.
#ifndef EMOPT_PREFETCH
#define EMOPT_PREFETCH 0
#endif
inline constexpr bool kPrefetches = EMOPT_PREFETCH != 0;

// Bytes of kernel arguments: what every toolkit and chip takes, and what a launch takes from CUDA
// 12.1 on (toolkit and driver) with sm_70 and up.
inline constexpr size_t kSmallLaunch = 4096;
inline constexpr size_t kLargeLaunch = 32764;

}  // namespace emopt::cuda
