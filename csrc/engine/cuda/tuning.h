// The numbers that a chip decides, and where each comes from. Each can be set by a macro, with
// which benchmarks/cuda compares others.
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

// The widest access that a thread makes. All chips that the kernel is for have it.
inline constexpr uint32_t kVectorBytes = 16;

// Elements of each operand that a thread holds at a time, side by side: one vector of float32, half
// a vector of a 2-byte type (with which a warp still reads 256 bytes in a row), two of float64.
// Eight need twice the registers, so leave room for half of the threads: the same bytes in flight,
// and fewer warps to convert and compute. Reckoned from the machine code, not yet measured.
#ifndef EMOPT_HELD
#define EMOPT_HELD 4
#endif
inline constexpr uint32_t kHeld = EMOPT_HELD;

// Threads of a block, and elements that they hold together.
inline constexpr uint32_t kThreads = 256;
inline constexpr uint32_t kTile = kThreads * kHeld;

// Blocks that a multiprocessor holds at a time, which bounds the registers of a thread: four to 64.
// Adam in float32 then has 64 KiB in flight on each, some twice of what 4.3 TB/s over 132 of them
// need to cover a microsecond. One less (80 registers) where the constants take registers because a
// block computes them, and where a sixth operand does, with which a thread has more in flight; half
// as many for float64. Reckoned, not yet measured.
#ifndef EMOPT_BLOCKS
#define EMOPT_BLOCKS 4
#endif
constexpr uint32_t blocks_at_a_time(size_t size_of_real, int num_operands, bool needs_setup) {
  const uint32_t fewer = (needs_setup ? 1 : 0) + (num_operands > 5 ? 1 : 0);
  return (EMOPT_BLOCKS - fewer) * 4 / static_cast<uint32_t>(size_of_real);
}

// Tiles that a block sweeps, at the most. Its start (finding its row, a few hundred cycles) is then
// some percent of the time that its share of the memory's bandwidth takes; more would leave the
// multiprocessors less evenly busy at the end. Reckoned, not yet measured.
#ifndef EMOPT_MAX_CHUNK
#define EMOPT_MAX_CHUNK 8
#endif
inline constexpr uint32_t kMaxChunk = EMOPT_MAX_CHUNK * kTile;

// Whether accesses say that nobody will want the data again soon. Expected: 1 to 2 percent where
// operands are larger than the L2 cache, a loss where the next kernel finds them there.
#ifndef EMOPT_STREAMING
#define EMOPT_STREAMING 0
#endif

// Whether a thread loads its next elements before it computes the present ones. Expected: nothing
// where other warps fill the time; it takes registers.
#ifndef EMOPT_PREFETCH
#define EMOPT_PREFETCH 0
#endif
inline constexpr bool kPrefetches = EMOPT_PREFETCH != 0;

// Bytes of kernel arguments: what every toolkit and chip takes, and what a launch takes from CUDA
// 12.1 on (toolkit and driver) with sm_70 and up.
inline constexpr size_t kSmallLaunch = 4096;
inline constexpr size_t kLargeLaunch = 32764;

}  // namespace emopt::cuda
