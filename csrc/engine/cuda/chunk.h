// The work of one thread: sweeping a rule over its elements of a row's chunk.
//
// Also compiles for the host, where threads run one after the other. The tests run it there under
// AddressSanitizer and UndefinedBehaviorSanitizer, which report out-of-bounds and misaligned
// accesses.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../epilogue.h"
#include "../stochastic.h"
#include "launch.h"
#include "vectors.h"

namespace emopt::cuda {

// The elements of a row that one block sweeps.
template <class Launch>
struct Chunk {
  uint32_t row;
  int64_t begin;  // its first element
  uint32_t length;
  uint32_t head;  // elements before the body
  uint32_t body;  // elements that are accessed as vectors

  EMOPT_FN Chunk(const Launch& launch, uint32_t block) : row(launch.row_of(block)) {
    begin = static_cast<int64_t>(block - launch.first_block[row]) * launch.chunk;
    const int64_t remaining = launch.numel[row] - begin;
    const uint32_t peel = launch.peel[row];
    length = remaining < launch.chunk ? static_cast<uint32_t>(remaining) : launch.chunk;
    head = peel < length && peel != kNoPhase ? peel : length;
    body = (length - head) / kHeld * kHeld;
  }

  // The address of element i of operand k. Reads the row's address from the launch each time:
  // keeping the addresses of all operands would take ten registers.
  template <class Bits>
  EMOPT_FN Bits* at(const Launch& launch, int k, uint32_t i) const {
    return static_cast<Bits*>(launch.data[k][row]) + (begin + i);
  }
};

// The elements of a chunk that a thread holds: in the body, kHeld contiguous ones; outside it,
// kHeld at a stride of kThreads. There are fewer elements outside than threads in a block, unless
// the body is empty.
template <class Launch>
struct Place {
  const Chunk<Launch>& chunk;
  uint32_t thread;
  uint32_t at;  // an index in the body; from its length on, in the elements outside

  EMOPT_FN Place(const Chunk<Launch>& chunk_, uint32_t thread_)
      : chunk(chunk_), thread(thread_), at(thread_ * kHeld) {
    if (!is_vector()) at = chunk.body + thread;
  }

  EMOPT_FN bool is_vector() const { return at < chunk.body; }
  EMOPT_FN bool has_any() const { return at < chunk.length; }
  EMOPT_FN uint32_t remaining() const { return chunk.length - at; }
  EMOPT_FN uint32_t first() const {
    if (is_vector()) return chunk.head + at;
    return at - chunk.body < chunk.head ? at - chunk.body : at;
  }

  EMOPT_FN void advance() {
    const bool was_vector = is_vector();
    at += kTile;
    if (was_vector && !is_vector()) at = chunk.body + thread;
  }
};

// The rule with a row's scalar states.
template <class Launch>
EMOPT_FN typename Launch::Rule rule_at(const Launch& launch, uint32_t row,
                                       const double (&scalars)[Launch::kScalars]) {
  typename Launch::Rule rule = launch.rule;
  for (int i = 0; i < kNumScalarStates<typename Launch::Rule>; ++i) {
    if (launch.steps[row].scalars[i] == nullptr) continue;
    scalars_of(rule)[i] = scalars[static_cast<int>(Launch::kFirstState) + i];
  }
  return rule;
}

// The data that the threads of a block share.
template <class Launch>
struct Setup {
  Constants<typename Launch::Rule, typename Launch::Epilogue, typename Launch::Real> constants;
  bool is_skipped = false;
  bool is_stochastic = false;
  uint64_t key = 0;

  // For launches whose scalars are all on the host.
  EMOPT_FN explicit Setup(const Launch& launch) : constants(launch.constants) {}

  // For launches with scalars in device memory, step counters or stochastic rounding. `rule` is the
  // launch's, with the row's scalar states.
  EMOPT_FN Setup(const Launch& launch, const typename Launch::Rule& rule, uint32_t row,
                 const double (&scalars)[Launch::kScalars])
      : constants(rule, scalars[0], launch.epilogue.with_scalars(scalars + 1)),
        is_skipped(launch.epilogue.with_scalars(scalars + 1).is_skipped()) {
    if constexpr (Launch::Epilogue::kHasRowSteps) {
      const auto count = static_cast<uint64_t>(static_cast<int64_t>(scalars[0]));
      key = rounding_key(launch.epilogue.seed, launch.steps[row].position, count);
      is_stochastic =
          launch.epilogue.is_stochastic && can_round_stochastically(launch.dtype[kUpdate]);
    }
  }
};

// The i-th scalar of a setup: the step, then the epilogue's. Each thread of a block reads one. Its
// address is selected before it is read, so that one instruction loads all scalars of a type;
// branches would serialize the loads.
template <class Launch>
EMOPT_FN double read_scalar(const Launch& launch, uint32_t row, uint32_t i) {
  HostOrDeviceScalar scalar = i == 0 ? launch.step : launch.epilogue.scalar(i - 1);
  bool is_counter = false;
  if constexpr (Launch::Epilogue::kHasRowSteps) {
    is_counter = i == 0 && launch.steps[row].counter != nullptr;
    if (is_counter) scalar = {0.0, launch.steps[row].counter};
  }
  if constexpr (Launch::kScalars != Launch::kFirstState) {
    if (i >= Launch::kFirstState) {
      scalar = {0.0, launch.steps[row].scalars[i - Launch::kFirstState]};
    }
  }
  const double value = scalar.read();
  return is_counter ? static_cast<double>(static_cast<float>(value) + 1.0f) : value;
}

// Calls `visit` with a value of operand k's stored type. With float32 arithmetic only the update
// may be float64, since operands that are read are not. The parameter and the weight may be a split
// master.
template <class Launch, class Visit>
EMOPT_FN void with_type_of(int k, DType dtype, Visit visit) {
  if (dtype == DType::kFloat32) {
    visit(float());
  } else if (dtype == DType::kBFloat16) {
    visit(BFloat16());
  } else if ((sizeof(typename Launch::Real) == sizeof(double) || k == kUpdate) &&
             dtype == DType::kFloat64) {
    visit(double());
  } else if (Launch::kMayBeSplit && k == kUpdate && dtype == DType::kSplitParam) {
    visit(SplitParam());
  } else if (Launch::kMayBeSplit && k == Launch::kOperands - 1 && dtype == DType::kRemainder) {
    visit(Remainder());
  } else {
    visit(Float16());
  }
}

// A thread's elements of all operands.
template <class Launch>
struct HeldOperands {
  using Real = typename Launch::Real;
  using Epilogue = typename Launch::Epilogue;
  static constexpr int kOperands = Launch::kOperands;
  static constexpr int kFirstWeight = kOperands - Epilogue::kOperands;

  Packet<sizeof(Real)> packets[kOperands];

  // Issues all loads before anything is computed.
  EMOPT_FN void load(const Launch& launch, const Place<Launch>& place) {
    const uint32_t first = place.first();
    if (place.is_vector()) {
      for_each_read(launch, [&](int k, auto bits) {
        packets[k].load_vectors(place.chunk.template at<decltype(bits)>(launch, k, first));
      });
    } else {
      for_each_read(launch, [&](int k, auto bits) {
        const auto* const from = place.chunk.template at<decltype(bits)>(launch, k, first);
        packets[k].load_singles(from, place.remaining());
      });
    }
  }

  EMOPT_FN void step_and_store(const Launch& launch, const Setup<Launch>& setup,
                               const Place<Launch>& place) {
    const uint32_t row = place.chunk.row;
    if (!place.is_vector()) {
      for_each_read(launch, [&](int k, auto bits) {
        if (sizeof(bits) == 2) packets[k].pack_words();
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
      apply(setup.constants, values, i, std::make_index_sequence<kFirstWeight - kFirstState>(),
            std::make_index_sequence<Epilogue::kOperands>());
    }
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_written<Epilogue, kOperands>(k, launch.data[k][row], launch.data[kUpdate][row])) {
        continue;
      }
      if (!is_stored<Epilogue, kOperands>(k, setup.constants.epilogue)) continue;
      with_type_of<Launch>(k, launch.dtype[k], [&](auto type) {
        using Stored = decltype(type);
        Packet<sizeof(Stored)> rounded;
        if (k == kUpdate && setup.is_stochastic) {
          round_stochastically<Stored>(rounded, values[k], launch, setup.key, place);
        } else {
          round<Stored>(rounded, values[k]);
        }
        auto* const to = place.chunk.template at<BitsOf<Stored>>(launch, k, place.first());
        if (place.is_vector()) {
          rounded.store_vectors(to);
        } else {
          rounded.store_singles(to, place.remaining());
        }
      });
    }
  }

 private:
  // Calls `visit` with each operand that is read, and an integer of its type's size. The update is
  // read only where it is the parameter of a split master.
  template <class Visit>
  EMOPT_FN static void for_each_read(const Launch& launch, Visit visit) {
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      const DType dtype = launch.dtype[k];
      if (k == kUpdate && !(Launch::kMayBeSplit && dtype == DType::kSplitParam)) continue;
      if (size_of(dtype) == 2) {
        visit(k, uint16_t());
      } else if (sizeof(Real) == sizeof(float) || dtype == DType::kFloat32) {
        visit(k, uint32_t());
      } else {
        visit(k, uint64_t());
      }
    }
  }

  // The stored value; for a remainder, the master weight.
  template <class Stored>
  EMOPT_FN Real widened(int k, uint32_t i) const {
    if constexpr (std::is_same_v<Stored, Remainder>) {
      return join(packets[kUpdate].template get<SplitParam>(i),
                  packets[k].template get<Remainder>(i));
    } else if constexpr (sizeof(Stored) <= sizeof(Real)) {  // else an update, which is not read
      return static_cast<Real>(widen(packets[k].template get<Stored>(i)));
    } else {
      return 0;
    }
  }

  template <class Constants, size_t... kState, size_t... kWeight>
  EMOPT_FN static void apply(const Constants& constants, Real (&values)[kOperands][kHeld],
                             uint32_t i, std::index_sequence<kState...>,
                             std::index_sequence<kWeight...>) {
    const Real grad =
        constants.epilogue.before(values[kGrad][i], values[kFirstWeight + kWeight][i]...);
    const Real update = constants.step(grad, values[kFirstState + kState][i]...);
    values[kUpdate][i] = constants.epilogue.after(update, values[kFirstWeight + kWeight][i]...);
  }

  template <class Stored>
  EMOPT_FN static void round(Packet<sizeof(Stored)>& packet, const Real (&values)[kHeld]) {
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      if constexpr (sizeof(Stored) != 2) {
        packet.put(i, Round<Stored>::from(values[i]));
      } else if (i % 2 == 0) {
        packet.words[i / 2] = round_pair<Stored>(values[i], values[i + 1]);
      }
    }
  }

  template <class Stored>
  EMOPT_FN static void round_stochastically(Packet<sizeof(Stored)>& packet,
                                            const Real (&values)[kHeld], const Launch& launch,
                                            uint64_t key, const Place<Launch>& place) {
    if constexpr (Epilogue::kHasRowSteps && kRoundsStochastically<Stored>) {
      const uint64_t first = launch.steps[place.chunk.row].first_index;
      const RandomBits random(key, first + static_cast<uint64_t>(place.chunk.begin));
      const uint32_t stride = place.is_vector() ? 1 : kThreads;
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kHeld; ++i) {
        const uint32_t bits = random(place.first() + i * stride);
        packet.put(i, RoundStochastically<Stored>::from(static_cast<float>(values[i]), bits));
      }
    }
  }
};

// `prepare(row)` returns a function that makes the setup. It may synchronize the block's threads
// and is called after the first loads were issued.
template <class Launch, class Prepare>
EMOPT_FN void sweep_chunk(const Launch& launch, uint32_t block, uint32_t thread, Prepare prepare) {
  const Chunk<Launch> chunk(launch, block);
  const auto make_setup = prepare(chunk.row);
  Place<Launch> next(chunk, thread);
  HeldOperands<Launch> next_held;
  if (next.has_any()) next_held.load(launch, next);
  Setup<Launch> setup = make_setup();
  if (setup.is_skipped || !next.has_any()) return;
  setup.constants.epilogue.scale_by(launch.scale[chunk.row]);
  do {
    const Place<Launch> place = next;
    HeldOperands<Launch> held = next_held;
    next.advance();
    if (kPrefetches && next.has_any()) next_held.load(launch, next);
    held.step_and_store(launch, setup, place);
    if (!kPrefetches && next.has_any()) next_held.load(launch, next);
  } while (next.has_any());
}

// Advances the counters `first`, `first + stride`, and so on.
EMOPT_FN void advance_counters(const Advance& advance, uint32_t first, uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  for (uint32_t i = first; i < advance.count; i += stride) *advance.counters[i] += 1.0f;
}

// Advances the rows `first`, `first + stride`, and so on.
template <class Rule>
EMOPT_FN void advance_scalars(const AdvanceScalars<Rule>& advance, uint32_t first,
                              uint32_t stride) {
  if (advance.found_inf.read() != 0.0) return;
  const double step = advance.step.read();
  for (uint32_t i = first; i < advance.count; i += stride) {
    const RowScalars& row = advance.rows[i];
    const bool has_counter = row.counter != nullptr;
    const float count = has_counter ? *row.counter + 1.0f : 0.0f;
    Rule rule = advance.rule;
    double* const scalars = scalars_of(rule);
    for (int k = 0; k < kNumScalarStates<Rule>; ++k) {
      scalars[k] = static_cast<double>(*row.scalars[k]);
    }
    rule.advance(has_counter ? static_cast<double>(count) : step);
    for (int k = 0; k < kNumScalarStates<Rule>; ++k) {
      *row.scalars[k] = static_cast<float>(scalars[k]);
    }
    if (has_counter) *row.counter = count;
  }
}

}  // namespace emopt::cuda
