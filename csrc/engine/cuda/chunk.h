// What a block of threads does: it sweeps a rule over one chunk of one row.
//
// All of it also compiles for the host, where two neighbouring threads run as two lanes of one
// call: so the tests run it under AddressSanitizer and UndefinedBehaviorSanitizer, which see each
// access that is out of bounds or not aligned.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../epilogue.h"
#include "launch.h"
#include "vectors.h"

namespace emopt::cuda {

// ---- between memory's types and the arithmetic type ---------------------------------------------

template <class Real, class Stored>
EMOPT_FN void widen_all(Real (&values)[kHeld], const Packet& packet) {
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kHeld; ++i) values[i] = static_cast<Real>(widen(packet.get<Stored>(i)));
}

template <class Real, class Stored>
EMOPT_FN void round_all(Packet& packet, const Real (&values)[kHeld]) {
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kHeld; ++i) packet.put(i, Round<Stored>::from(values[i]));
}

// Calls `visit` with a value of the type that operand k is stored in. An update may be float64
// where the arithmetic is float32, but nothing that is read.
template <class Real, class Visit>
EMOPT_FN void with_type_of(int k, DType dtype, Visit visit) {
  if (dtype == DType::kFloat32) {
    visit(float());
  } else if (dtype == DType::kBFloat16) {
    visit(BFloat16());
  } else if ((sizeof(Real) == sizeof(double) || k == kUpdate) && dtype == DType::kFloat64) {
    visit(double());
  } else {
    visit(Float16());
  }
}

template <size_t kBytes>
using BitsOf =
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

// ---- the rule -----------------------------------------------------------------------------------

template <class Step, class Epilogue, class Real, int kOperands, uint32_t kCount, size_t... kState>
EMOPT_FN void apply(const Step& step, Epilogue epilogue, Real (&values)[kOperands][kCount],
                    std::index_sequence<kState...>) {
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kCount; ++i) {
    values[kUpdate][i] =
        epilogue.after(step(epilogue.before(values[kGrad][i]), values[kFirstState + kState][i]...));
  }
}

template <int kOperands>
using States = std::make_index_sequence<kOperands - kFirstState>;

// ---- one element at a time ----------------------------------------------------------------------

// The elements of a chunk before and after its body: fewer than a block has threads, unless there
// is no body. Neighbouring threads access neighbouring elements, and no load waits for another.
template <class Real, int kOperands, class Step, class Epilogue>
EMOPT_FN void sweep_ends(const Step& step, Epilogue epilogue, const DType* dtype,
                         char* const (&data)[kOperands], uint32_t head, uint32_t body,
                         uint32_t length, uint32_t thread) {
  const uint32_t count = length - body;
  for (uint32_t i = thread; i < count; i += kHeld * kThreads) {
    const uint32_t first = i < head ? i : i + body;
    BitsOf<sizeof(Real)> bits[kOperands][kHeld] = {};
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      with_type_of<Real>(k, dtype[k], [&](auto type) {
        const auto* const from = reinterpret_cast<const decltype(type)*>(data[k]) + first;
        EMOPT_UNROLL
        for (uint32_t j = 0; j < kHeld; ++j) {
          if (i + j * kThreads >= count) continue;
          bits[k][j] =
              static_cast<BitsOf<sizeof(Real)>>(bit_cast<BitsOf<sizeof(type)>>(from[j * kThreads]));
        }
      });
    }
    Real values[kOperands][kHeld];
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      with_type_of<Real>(k, dtype[k], [&](auto type) {
        using Stored = decltype(type);
        EMOPT_UNROLL
        for (uint32_t j = 0; j < kHeld; ++j) {
          const auto stored = bit_cast<Stored>(static_cast<BitsOf<sizeof(type)>>(bits[k][j]));
          values[k][j] = static_cast<Real>(widen(stored));
        }
      });
    }
    apply(step, epilogue, values, States<kOperands>());
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (k == kGrad) continue;
      with_type_of<Real>(k, dtype[k], [&](auto type) {
        using Stored = decltype(type);
        auto* const to = reinterpret_cast<Stored*>(data[k]) + first;
        EMOPT_UNROLL
        for (uint32_t j = 0; j < kHeld; ++j) {
          if (i + j * kThreads < count) to[j * kThreads] = Round<Stored>::from(values[k][j]);
        }
      });
    }
  }
}

// ---- by vectors ---------------------------------------------------------------------------------

// Between the elements that a pair of threads accesses and those that each computes: of two vectors
// of a 2-byte type, the even thread's second half and the odd thread's first half change places.
template <int kLanes>
EMOPT_FN void exchange(Packet (&packets)[kLanes], bool is_odd) {
#if defined(__CUDA_ARCH__)
  EMOPT_UNROLL
  for (int w = 0; w < 2; ++w) {
    const uint32_t sent = is_odd ? packets[0].word(w) : packets[0].word(w + 2);
    const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, 1);
    (is_odd ? packets[0].word(w) : packets[0].word(w + 2)) = received;
  }
#else
  static_cast<void>(is_odd);
  for (uint32_t w = 0; w < 2; ++w) std::swap(packets[0].word(w + 2), packets[1].word(w));
#endif
}

template <class Real, int kLanes, int kOperands, class Step, class Epilogue>
EMOPT_FN void sweep_body(const Step& step, Epilogue epilogue, const DType* dtype,
                         char* const (&data)[kOperands], uint32_t begin, uint32_t end,
                         uint32_t thread) {
  const bool is_odd = (thread & 1) != 0;
  for (uint32_t tile = begin; tile < end; tile += kTile) {
    Packet packets[kOperands][kLanes] = {};
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      EMOPT_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const Held held(begin, end, tile, thread + static_cast<uint32_t>(lane));
        load_vectors<Real>(packets[k][lane], dtype[k], data[k], held);
      }
    }
    Real values[kLanes][kOperands][kHeld];
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      if (size_of(dtype[k]) == 2) exchange(packets[k], is_odd);
      with_type_of<Real>(k, dtype[k], [&](auto type) {
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          widen_all<Real, decltype(type)>(values[lane][k], packets[k][lane]);
        }
      });
    }
    EMOPT_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      apply(step, epilogue, values[lane], States<kOperands>());
    }
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (k == kGrad) continue;
      with_type_of<Real>(k, dtype[k], [&](auto type) {
        Packet rounded[kLanes];
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          round_all<Real, decltype(type)>(rounded[lane], values[lane][k]);
        }
        if (sizeof(type) == 2) exchange(rounded, is_odd);
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          const Held held(begin, end, tile, thread + static_cast<uint32_t>(lane));
          store_vectors<sizeof(type)>(rounded[lane], data[k], held);
        }
      });
    }
  }
}

// ---- a block ------------------------------------------------------------------------------------

// `thread` and the `kLanes - 1` threads after it.
template <class Epilogue, int kLanes, class Launch>
EMOPT_FN void sweep_chunk(const Launch& launch, const typename Launch::Step& step, uint32_t block,
                          uint32_t thread) {
  using Real = typename Launch::Real;
  constexpr int kOperands = Launch::kOperands;
  const uint32_t row = launch.row_of(block);
  const int64_t begin = static_cast<int64_t>(block - launch.first_block[row]) * kChunk;
  const int64_t left = launch.numel[row] - begin;
  const uint32_t length = left < kChunk ? static_cast<uint32_t>(left) : kChunk;
  const uint32_t peel = launch.peel[row];
  const uint32_t head = peel < length && peel != kNoPhase ? peel : length;
  const uint32_t body = (length - head) / kHeld * kHeld;
  const typename Epilogue::template At<Real> epilogue(Epilogue(), launch.scale[row]);
  char* data[kOperands];
  EMOPT_UNROLL
  for (int k = 0; k < kOperands; ++k) {
    data[k] = static_cast<char*>(launch.data[k][row]) + begin * size_of(launch.dtype[k]);
  }
  sweep_body<Real, kLanes>(step, epilogue, launch.dtype, data, head, head + body, thread);
  EMOPT_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    sweep_ends<Real>(step, epilogue, launch.dtype, data, head, body, length,
                     thread + static_cast<uint32_t>(lane));
  }
}

// The step that the device's memory holds.
EMOPT_FN double read_step(const StepSource& source) {
  return source.is_int64 ? static_cast<double>(*static_cast<const int64_t*>(source.address))
                         : static_cast<double>(*static_cast<const float*>(source.address));
}

}  // namespace emopt::cuda
