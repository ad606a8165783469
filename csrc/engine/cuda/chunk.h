// What a thread does: it sweeps a rule over its elements of one chunk of one row.
//
// All of it also compiles for the host, where threads run one after the other: so the tests run it
// under AddressSanitizer and UndefinedBehaviorSanitizer, which see each access that is out of
// bounds or not aligned.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../epilogue.h"
#include "../stochastic.h"
#include "launch.h"
#include "vectors.h"

namespace emopt::cuda {

// A row's part that a block works on.
template <class Launch>
struct Chunk {
  uint32_t row;
  int64_t begin;  // its first element
  uint32_t length;
  uint32_t head;  // elements before the body
  uint32_t body;  // elements that are accessed by vectors

  EMOPT_FN Chunk(const Launch& launch, uint32_t block) : row(launch.row_of(block)) {
    begin = static_cast<int64_t>(block - launch.first_block[row]) * launch.chunk;
    const int64_t left = launch.numel[row] - begin;
    const uint32_t peel = launch.peel[row];
    length = left < launch.chunk ? static_cast<uint32_t>(left) : launch.chunk;
    head = peel < length && peel != kNoPhase ? peel : length;
    body = (length - head) / kHeld * kHeld;
  }

  // Where a place begins in operand k. The address of a row is read from the launch each time:
  // those of all operands would take ten registers.
  template <class Bits>
  EMOPT_FN Bits* at(const Launch& launch, int k, const Place& place) const {
    return static_cast<Bits*>(launch.data[k][row]) + (begin + place.first);
  }
};

// The places of a thread in a chunk, one after the other: those in the body, then those in what is
// before and after it. That is less than a block has threads, unless there is no body.
template <class Launch>
struct Places {
  const Chunk<Launch>& chunk;
  uint32_t thread;
  uint32_t at;  // in the body, or, from its length on, in the rest

  EMOPT_FN Places(const Chunk<Launch>& chunk_, uint32_t thread_)
      : chunk(chunk_), thread(thread_), at(thread_ * kHeld) {
    if (at >= chunk.body) at = chunk.body + thread;
  }

  EMOPT_FN bool any_left() const { return at < chunk.length; }

  EMOPT_FN Place get() const {
    if (at < chunk.body) return {true, chunk.head + at, 0};
    return {false, at - chunk.body < chunk.head ? at - chunk.body : at, chunk.length - at};
  }

  EMOPT_FN void next() {
    const bool was_body = at < chunk.body;
    at += kTile;
    if (was_body && at >= chunk.body) at = chunk.body + thread;
  }
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
  EMOPT_FN Setup(const Launch& launch, uint32_t row, const double (&numbers)[Launch::kNumbers])
      : Setup(launch, row, numbers[0], launch.epilogue.with_numbers(numbers + 1)) {}

 private:
  EMOPT_FN Setup(const Launch& launch, uint32_t row, double step,
                 const typename Launch::Epilogue& epilogue)
      : constants(launch.rule, step, epilogue), is_skipped(epilogue.is_skipped()) {
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      is_stochastic = epilogue.is_stochastic && can_round_stochastically(launch.dtype[kUpdate]);
      if (is_stochastic) {
        const auto count = static_cast<uint64_t>(static_cast<int64_t>(step));
        key = rounding_key(epilogue.seed, launch.steps.position[row], count);
      }
    }
  }
};

// Of what a setup reads, the i-th number: the step, then those of the epilogue. Each by a thread of
// its own, so that they are under way at the same time.
template <class Launch>
EMOPT_FN double read_number(const Launch& launch, uint32_t row, uint32_t i) {
  if (i != 0) return launch.epilogue.number(i - 1).read();
  if constexpr (Launch::Epilogue::kHasRowSteps) {
    const float* const counter = launch.steps.counter[row];
    if (counter != nullptr) return static_cast<double>(*counter + 1.0f);
  }
  return launch.step.read();
}

// ---- between memory's types and the arithmetic type ---------------------------------------------

// Calls `visit` with a number of the size of operand k's type.
template <class Real, class Visit>
EMOPT_FN void with_size_of(DType dtype, Visit visit) {
  if (size_of(dtype) == 2) {
    visit(uint16_t());
  } else if (sizeof(Real) == sizeof(float) || dtype == DType::kFloat32) {
    visit(uint32_t());
  } else {
    visit(uint64_t());
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

// What a thread holds of all operands.
template <class Launch>
struct Hand {
  using Real = typename Launch::Real;
  using Epilogue = typename Launch::Epilogue;
  static constexpr int kOperands = Launch::kOperands;
  static constexpr int kFirstOwn = kOperands - Epilogue::kOperands;

  Packet<sizeof(Real)> packets[kOperands];

  // All loads, before anything is computed. The update is read only where it is half of a master.
  EMOPT_FN void load(const Launch& launch, const Chunk<Launch>& chunk, const Place& place) {
    if (place.is_vector) {
      for_each_read(launch, [&](int k, auto bits) {
        packets[k].load_vectors(chunk.template at<decltype(bits)>(launch, k, place));
      });
    } else {
      for_each_read(launch, [&](int k, auto bits) {
        packets[k].load_singles(chunk.template at<decltype(bits)>(launch, k, place), place.left);
      });
    }
  }

  EMOPT_FN void step_and_store(const Launch& launch, const Setup<Launch>& setup,
                               const Chunk<Launch>& chunk, const Place& place) {
    if (!place.is_vector) {
      for_each_read(launch, [&](int k, auto bits) {
        if (sizeof(bits) == 2) packets[k].join_halves();
      });
    }
    Real values[kOperands][kHeld];
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      with_type_of<Launch>(k, launch.dtype[k], [&](auto type) {
        EMOPT_UNROLL
        for (uint32_t i = 0; i < kHeld; ++i) values[k][i] = widened<decltype(type)>(k, i);
      });
    }
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      apply(setup.constants, values, i, std::make_index_sequence<kFirstOwn - kFirstState>(),
            std::make_index_sequence<Epilogue::kOperands>());
    }
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      const void* const update = launch.data[kUpdate][chunk.row];
      if (!is_written<Epilogue, kOperands>(k, launch.data[k][chunk.row], update)) continue;
      if (!is_stored(k, launch.dtype[k], setup.constants.epilogue)) continue;
      with_type_of<Launch>(k, launch.dtype[k], [&](auto type) {
        using Stored = decltype(type);
        Packet<sizeof(Stored)> rounded;
        if (k == kUpdate && setup.is_stochastic) {
          round_stochastically<Stored>(rounded, values[k], launch, setup, chunk, place);
        } else {
          round<Stored>(rounded, values[k]);
        }
        auto* const to = chunk.template at<BitsOf<Stored>>(launch, k, place);
        if (place.is_vector) {
          rounded.store_vectors(to);
        } else {
          rounded.store_singles(to, place.left);
        }
      });
    }
  }

 private:
  // Calls `visit` with each operand that is read, and a number of its type's size.
  template <class Visit>
  EMOPT_FN static void for_each_read(const Launch& launch, Visit visit) {
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      const DType dtype = launch.dtype[k];
      if (k == kUpdate && !(Launch::kMayBeHalved && dtype == DType::kHighHalf)) continue;
      with_size_of<Real>(dtype, [&](auto bits) { visit(k, bits); });
    }
  }

  template <class Stored>
  using BitsOf = std::conditional_t<
      sizeof(Stored) == 2, uint16_t,
      std::conditional_t<sizeof(Stored) == sizeof(uint32_t), uint32_t, uint64_t>>;

  // A number as it is stored; of a low half, the master.
  template <class Stored>
  EMOPT_FN Real widened(int k, uint32_t i) const {
    const auto stored = packets[k].template get<Stored>(i);
    if constexpr (std::is_same_v<Stored, LowHalf>) {
      return join(packets[kUpdate].template get<HighHalf>(i), stored);
    } else {
      return static_cast<Real>(widen(stored));
    }
  }

  template <class Constants, size_t... kState, size_t... kOwn>
  EMOPT_FN static void apply(const Constants& constants, Real (&values)[kOperands][kHeld],
                             uint32_t i, std::index_sequence<kState...>,
                             std::index_sequence<kOwn...>) {
    const Real grad = constants.epilogue.before(values[kGrad][i], values[kFirstOwn + kOwn][i]...);
    const Real update = constants.step(grad, values[kFirstState + kState][i]...);
    values[kUpdate][i] = constants.epilogue.after(update, values[kFirstOwn + kOwn][i]...);
  }

  template <class Stored>
  EMOPT_FN static void round(Packet<sizeof(Stored)>& packet, const Real (&values)[kHeld]) {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; i += 2) {
      if constexpr (sizeof(Stored) == 2) {
        packet.words[i / 2] = round_pair<Stored>(values[i], values[i + 1]);
      } else {
        packet.put(i, Round<Stored>::from(values[i]));
        packet.put(i + 1, Round<Stored>::from(values[i + 1]));
      }
    }
  }

  template <class Stored>
  EMOPT_FN static void round_stochastically(Packet<sizeof(Stored)>& packet,
                                            const Real (&values)[kHeld], const Launch& launch,
                                            const Setup<Launch>& setup, const Chunk<Launch>& chunk,
                                            const Place& place) {
    if constexpr (Epilogue::kHasRowSteps && kRoundsStochastically<Stored>) {
      const uint64_t first = launch.steps.first_index[chunk.row];
      const RandomBits random(setup.key, first + static_cast<uint64_t>(chunk.begin));
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kHeld; ++i) {
        const uint32_t bits = random(place.first + i * place.stride());
        packet.put(i, RoundStochastically<Stored>::from(static_cast<float>(values[i]), bits));
      }
    }
  }
};

// ---- a thread -----------------------------------------------------------------------------------

// `prepare(row)` returns the setup, for which its block's threads may wait for each other: the
// first loads are under way by then.
template <class Launch, class Prepare>
EMOPT_FN void sweep_chunk(const Launch& launch, uint32_t block, uint32_t thread, Prepare prepare) {
  const Chunk<Launch> chunk(launch, block);
  Places<Launch> places(chunk, thread);
  Hand<Launch> hand;
  if (places.any_left()) hand.load(launch, chunk, places.get());
  Setup<Launch> setup = prepare(chunk.row);
  if (setup.is_skipped) return;
  setup.constants.epilogue.scale_by(launch.scale[chunk.row]);
  while (places.any_left()) {
    const Place place = places.get();
    places.next();
    Hand<Launch> held = hand;
    if (kPrefetches && places.any_left()) hand.load(launch, chunk, places.get());
    held.step_and_store(launch, setup, chunk, place);
    if (!kPrefetches && places.any_left()) hand.load(launch, chunk, places.get());
  }
}

// The counters that start at `first`, each `stride` after the last one.
EMOPT_FN void advance_counters(const Advance& advance, uint32_t first, uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  for (uint32_t i = first; i < advance.count; i += stride) *advance.counters[i] += 1.0f;
}

}  // namespace emopt::cuda
