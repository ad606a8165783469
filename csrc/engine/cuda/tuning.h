// The numbers that a chip decides, and where each comes from.
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
inline constexpr int kVectorBytes = 16;

// Elements that a thread holds at a time: a vector of a 2-byte type, two of float32, four of
// float64. With three float32 operands to read, 96 bytes are in flight per thread; at 768 threads
// on a multiprocessor (80 registers each) 72 KiB, about twice what 4.3 TB/s over 132
// multiprocessors needs to cover a microsecond. Reckoned, not yet measured.
inline constexpr uint32_t kHeld = 8;

// Threads of a block, and elements that one round of a block covers.
inline constexpr uint32_t kThreads = 256;
inline constexpr uint32_t kTile = kThreads * kHeld;

// Elements of one tensor that a block sweeps. A block's start (finding its row, a few hundred
// cycles) is then some percent of the time that its share of the memory's bandwidth takes, and a
// thousand tensors of a thousand elements still make a thousand blocks. Reckoned, not yet measured.
inline constexpr uint32_t kChunk = 4 * kTile;

// Bytes of kernel arguments: what every toolkit and chip takes, and what a launch takes from CUDA
// 12.1 on (toolkit and driver) with sm_70 and up.
inline constexpr size_t kSmallLaunch = 4096;
inline constexpr size_t kLargeLaunch = 32764;

}  // namespace emopt::cuda
