// Tuning constants. None has been measured on a GPU yet: the reasons are estimates from the machine
// code and a bandwidth of 4.3 TB/s (H200). benchmarks/cuda sets the macros.
#pragma once

#include <cstddef>
#include <cstdint>

// Arrays stay in registers only if the loops over them are unrolled.
#if defined(__CUDACC__)
#define EMOPT_UNROLL _Pragma("unroll")
#define EMOPT_NO_UNROLL _Pragma("unroll 1")
#else
#define EMOPT_UNROLL
#define EMOPT_NO_UNROLL
#endif

namespace emopt::cuda {

// Contiguous elements of each operand that a thread holds: 16 bytes of float32, 8 of a 2-byte type
// (a warp still reads 256 contiguous bytes), 4 of codes, 32 of float64. Eight elements would need
// twice the registers: the same bytes in flight, from half as many warps.
#ifndef EMOPT_HELD
#define EMOPT_HELD 4
#endif
inline constexpr uint32_t kHeld = EMOPT_HELD;

// Threads of a block, and the elements that they hold.
inline constexpr uint32_t kThreads = 256;
inline constexpr uint32_t kTile = kThreads * kHeld;

// Blocks resident on a multiprocessor, which limits a thread's registers: four allow 64. Adam in
// float32 then has 64 KiB in flight on each multiprocessor, twice what 132 of them need to cover a
// microsecond of latency. One block less (80 registers) if blocks compute the constants, which then
// take registers, and with a sixth operand; half as many for float64.
#ifndef EMOPT_BLOCKS
#define EMOPT_BLOCKS 4
#endif
inline constexpr int kBlocks = EMOPT_BLOCKS;

// The most elements that a block sweeps, in tiles. Finding the row (a few hundred cycles) is then a
// few percent of a block's time; larger chunks would lengthen the tail of a launch.
#ifndef EMOPT_MAX_CHUNK
#define EMOPT_MAX_CHUNK 8
#endif
inline constexpr uint32_t kMaxChunk = EMOPT_MAX_CHUNK * kTile;

// Elements of a gradient that a thread loads before it adds the first one to a norm's sum: 64 KiB
// of float32 in flight on a multiprocessor, half of that in a 16-bit type. At least six blocks of
// threads are resident; with the 32 registers that a thread takes, there are eight.
inline constexpr uint32_t kNormLoads = 8;
inline constexpr int kNormBlocks = 6;

// Both are off. EMOPT_STREAMING marks accesses as evict-first: it should gain 1 to 2 percent if
// operands are larger than the L2 cache, and lose if they fit. With EMOPT_PREFETCH, a thread loads
// its next elements before it computes the current ones: no gain is expected, since other warps
// hide the latency.
#ifndef EMOPT_PREFETCH
#define EMOPT_PREFETCH 0
#endif
inline constexpr bool kPrefetches = EMOPT_PREFETCH != 0;

// The limits on the bytes of kernel arguments: on all devices, and from CUDA 12.1 (toolkit and
// driver) on sm_70 and later.
inline constexpr size_t kSmallLaunch = 4096;
inline constexpr size_t kLargeLaunch = 32764;

}  // namespace emopt::cuda
