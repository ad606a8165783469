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
#include "../stochastic.h"
#include "launch.h"
#include "vectors.h"

namespace emopt::cuda {

// ---- between memory's types and the arithmetic type ---------------------------------------------

// A number as it is stored; of a low half, the master.
template <class Stored>
EMOPT_FN auto widen_beside(HighHalf high, Stored stored) {
  if constexpr (std::is_same_v<Stored, LowHalf>) {
    return join(high, stored);
  } else {
    static_cast<void>(high);
    return widen(stored);
  }
}

template <class Real, class Stored>
EMOPT_FN void widen_all(Real (&values)[kHeld], const Packet& param, const Packet& packet) {
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kHeld; ++i) {
    const HighHalf high = param.get<HighHalf>(i);
    values[i] = static_cast<Real>(widen_beside(high, packet.get<Stored>(i)));
  }
}

template <class Real, class Stored>
EMOPT_FN void round_all(Packet& packet, const Real (&values)[kHeld]) {
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kHeld; ++i) packet.put(i, Round<Stored>::from(values[i]));
}

// The elements are the chunk's from `first` on, from the second half on those from `second` on.
template <class Real, class Stored>
EMOPT_FN void round_all_stochastically(Packet& packet, const Real (&values)[kHeld],
                                       const RandomBits& random, uint32_t first, uint32_t second) {
  if constexpr (kRoundsStochastically<Stored>) {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      const uint32_t bits = random(i < kHeld / 2 ? first + i : second + i - kHeld / 2);
      packet.put(i, RoundStochastically<Stored>::from(static_cast<float>(values[i]), bits));
    }
  }
}

// Calls `visit` with a value of the type that operand k is stored in. An update may be float64
// where the arithmetic is float32, but nothing that is read. A parameter, and the weight beside it,
// may be the halves of a master.
template <class Launch, class Visit>
EMOPT_FN void with_type_of(int k, DType dtype, Visit visit) {
  constexpr bool kIsDouble = sizeof(typename Launch::Real) == sizeof(double);
  constexpr bool kMayBeHalved = Launch::kMayBeHalved;
  if (dtype == DType::kFloat32) {
    visit(float());
  } else if (dtype == DType::kBFloat16) {
    visit(BFloat16());
  } else if ((kIsDouble || k == kUpdate) && dtype == DType::kFloat64) {
    visit(double());
  } else if (kMayBeHalved && k == kUpdate && dtype == DType::kHighHalf) {
    visit(HighHalf());
  } else if (kMayBeHalved && k == Launch::kOperands - 1 && dtype == DType::kLowHalf) {
    visit(LowHalf());
  } else {
    visit(Float16());
  }
}

// Whether operand k is read: the update only where it is half of a master.
template <class Launch>
EMOPT_FN bool is_loaded(int k, DType dtype) {
  return k != kUpdate || (Launch::kMayBeHalved && dtype == DType::kHighHalf);
}

template <size_t kBytes>
using BitsOf =
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

// ---- the rule -----------------------------------------------------------------------------------

template <class Constants, int kOperands, uint32_t kCount, size_t... kState, size_t... kOwn>
EMOPT_FN void apply(const Constants& constants,
                    typename Constants::Real (&values)[kOperands][kCount],
                    std::index_sequence<kState...>, std::index_sequence<kOwn...>) {
  constexpr size_t kFirstOwn = kFirstState + sizeof...(kState);
  EMOPT_UNROLL
  for (uint32_t i = 0; i < kCount; ++i) {
    const auto grad = constants.epilogue.before(values[kGrad][i], values[kFirstOwn + kOwn][i]...);
    const auto update = constants.step(grad, values[kFirstState + kState][i]...);
    values[kUpdate][i] = constants.epilogue.after(update, values[kFirstOwn + kOwn][i]...);
  }
}

// A row's part that a block works on.
template <class Launch>
struct Chunk {
  static constexpr int kOperands = Launch::kOperands;
  using Epilogue = typename Launch::Epilogue;
  using States = std::make_index_sequence<kOperands - Epilogue::kOperands - kFirstState>;
  using Owns = std::make_index_sequence<Epilogue::kOperands>;

  char* data[kOperands];
  RandomBits random;  // of its elements, for stochastic rounding
  uint32_t length;
  uint32_t head;  // elements before the body
  uint32_t body;  // elements that are accessed by vectors
};

// ---- what holds for a block ---------------------------------------------------------------------

template <class Launch>
struct Setup {
  Constants<typename Launch::Rule, typename Launch::Epilogue, typename Launch::Real> constants;
  bool is_skipped = false;
  bool is_stochastic = false;
  uint64_t key = 0;

  // Where the host knows all that is needed.
  EMOPT_FN explicit Setup(const Launch& launch) : constants(launch.constants) {}

  // Where a number or the step is in the device's memory, or the row has a key. In float64.
  EMOPT_FN Setup(const Launch& launch, uint32_t row)
      : constants(launch.rule, step_of(launch, row), launch.epilogue),
        is_skipped(launch.epilogue.is_skipped()) {
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      is_stochastic =
          launch.epilogue.is_stochastic && can_round_stochastically(launch.dtype[kUpdate]);
      if (is_stochastic) {
        const auto step = static_cast<int64_t>(step_of(launch, row));
        key = rounding_key(launch.epilogue.seed, launch.steps.position[row],
                           static_cast<uint64_t>(step));
      }
    }
  }

 private:
  EMOPT_FN static double step_of(const Launch& launch, uint32_t row) {
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      const float* const counter = launch.steps.counter[row];
      if (counter != nullptr) return static_cast<double>(*counter + 1.0f);
    }
    return launch.step.read();
  }
};

// ---- one element at a time ----------------------------------------------------------------------

// The elements of a chunk before and after its body: fewer than a block has threads, unless there
// is no body. Neighbouring threads access neighbouring elements, and no load waits for another.
template <class Launch>
EMOPT_FN void sweep_ends(const Setup<Launch>& setup, const DType* dtype, const Chunk<Launch>& chunk,
                         uint32_t thread) {
  using Real = typename Launch::Real;
  constexpr int kOperands = Launch::kOperands;
  const uint32_t count = chunk.length - chunk.body;
  for (uint32_t i = thread; i < count; i += kHeld * kThreads) {
    const uint32_t first = i < chunk.head ? i : i + chunk.body;
    BitsOf<sizeof(Real)> bits[kOperands][kHeld] = {};
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_loaded<Launch>(k, dtype[k])) continue;
      with_type_of<Launch>(k, dtype[k], [&](auto type) {
        const auto* const from = reinterpret_cast<const decltype(type)*>(chunk.data[k]) + first;
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
      with_type_of<Launch>(k, dtype[k], [&](auto type) {
        using Stored = decltype(type);
        EMOPT_UNROLL
        for (uint32_t j = 0; j < kHeld; ++j) {
          const auto stored = bit_cast<Stored>(static_cast<BitsOf<sizeof(type)>>(bits[k][j]));
          const HighHalf high{static_cast<uint16_t>(bits[kUpdate][j])};
          values[k][j] = static_cast<Real>(widen_beside(high, stored));
        }
      });
    }
    apply(setup.constants, values, typename Chunk<Launch>::States(),
          typename Chunk<Launch>::Owns());
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_written<typename Launch::Epilogue>(k, chunk.data)) continue;
      if (!is_stored(k, dtype[k], setup.constants.epilogue)) continue;
      with_type_of<Launch>(k, dtype[k], [&](auto type) {
        using Stored = decltype(type);
        auto* const to = reinterpret_cast<Stored*>(chunk.data[k]) + first;
        EMOPT_UNROLL
        for (uint32_t j = 0; j < kHeld; ++j) {
          if (i + j * kThreads >= count) continue;
          if constexpr (Launch::Epilogue::kHasRowSteps && kRoundsStochastically<Stored>) {
            if (k == kUpdate && setup.is_stochastic) {
              const uint32_t bits = chunk.random(first + j * kThreads);
              to[j * kThreads] =
                  RoundStochastically<Stored>::from(static_cast<float>(values[k][j]), bits);
              continue;
            }
          }
          to[j * kThreads] = Round<Stored>::from(values[k][j]);
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

template <int kLanes, class Launch>
EMOPT_FN void sweep_body(const Setup<Launch>& setup, const DType* dtype, const Chunk<Launch>& chunk,
                         uint32_t thread) {
  using Real = typename Launch::Real;
  constexpr int kOperands = Launch::kOperands;
  const uint32_t begin = chunk.head;
  const uint32_t end = chunk.head + chunk.body;
  const bool is_odd = (thread & 1) != 0;
  for (uint32_t tile = begin; tile < end; tile += kTile) {
    Packet packets[kOperands][kLanes] = {};
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_loaded<Launch>(k, dtype[k])) continue;
      EMOPT_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        const Held held(begin, end, tile, thread + static_cast<uint32_t>(lane));
        load_vectors<Real>(packets[k][lane], dtype[k], chunk.data[k], held);
      }
    }
    Real values[kLanes][kOperands][kHeld];
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_loaded<Launch>(k, dtype[k])) continue;
      if (size_of(dtype[k]) == 2) exchange(packets[k], is_odd);
      if (k == kUpdate) continue;  // half of what the last operand is
      with_type_of<Launch>(k, dtype[k], [&](auto type) {
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          widen_all<Real, decltype(type)>(values[lane][k], packets[kUpdate][lane],
                                          packets[k][lane]);
        }
      });
    }
    EMOPT_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      apply(setup.constants, values[lane], typename Chunk<Launch>::States(),
            typename Chunk<Launch>::Owns());
    }
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_written<typename Launch::Epilogue>(k, chunk.data)) continue;
      if (!is_stored(k, dtype[k], setup.constants.epilogue)) continue;
      with_type_of<Launch>(k, dtype[k], [&](auto type) {
        Packet rounded[kLanes];
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          if (Launch::Epilogue::kHasRowSteps && k == kUpdate && setup.is_stochastic) {
            const Held held(begin, end, tile, thread + static_cast<uint32_t>(lane));
            round_all_stochastically<Real, decltype(type)>(rounded[lane], values[lane][k],
                                                           chunk.random, held.first, held.second);
          } else {
            round_all<Real, decltype(type)>(rounded[lane], values[lane][k]);
          }
        }
        if (sizeof(type) == 2) exchange(rounded, is_odd);
        EMOPT_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          const Held held(begin, end, tile, thread + static_cast<uint32_t>(lane));
          store_vectors<sizeof(type)>(rounded[lane], chunk.data[k], held);
        }
      });
    }
  }
}

// ---- a block ------------------------------------------------------------------------------------

// `thread` and the `kLanes - 1` threads after it.
template <int kLanes, class Launch>
EMOPT_FN void sweep_chunk(const Launch& launch, Setup<Launch> setup, uint32_t row, uint32_t block,
                          uint32_t thread) {
  const int64_t begin = static_cast<int64_t>(block - launch.first_block[row]) * kChunk;
  const int64_t left = launch.numel[row] - begin;
  const uint32_t peel = launch.peel[row];
  Chunk<Launch> chunk;
  if constexpr (Launch::Epilogue::kHasRowSteps) {
    if (setup.is_stochastic) {
      const uint64_t first = launch.steps.first_index[row] + static_cast<uint64_t>(begin);
      chunk.random = RandomBits(setup.key, first);
    }
  }
  chunk.length = left < kChunk ? static_cast<uint32_t>(left) : kChunk;
  chunk.head = peel < chunk.length && peel != kNoPhase ? peel : chunk.length;
  chunk.body = (chunk.length - chunk.head) / kHeld * kHeld;
  EMOPT_UNROLL
  for (int k = 0; k < Launch::kOperands; ++k) {
    chunk.data[k] = static_cast<char*>(launch.data[k][row]) + begin * size_of(launch.dtype[k]);
  }
  setup.constants.epilogue.scale_by(launch.scale[row]);
  sweep_body<kLanes>(setup, launch.dtype, chunk, thread);
  EMOPT_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    sweep_ends(setup, launch.dtype, chunk, thread + static_cast<uint32_t>(lane));
  }
}

// The counters that start at `first`, each `stride` after the last one.
EMOPT_FN void advance_counters(const Advance& advance, uint32_t first, uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  for (uint32_t i = first; i < advance.count; i += stride) *advance.counters[i] += 1.0f;
}

}  // namespace emopt::cuda
