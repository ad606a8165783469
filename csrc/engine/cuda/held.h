// A thread's elements of all operands: loads, the rule's step, stores.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../codes.h"
#include "../stochastic.h"
#include "place.h"
#include "setup.h"
#include "vectors.h"

namespace emopt::cuda {

// A code as stored. Its value depends on its group's scale.
template <class Format_>
struct StoredCode {
  using Format = Format_;
  uint8_t bits;
};
template <class Stored>
inline constexpr bool kIsCode = false;
template <class Format>
inline constexpr bool kIsCode<StoredCode<Format>> = true;

// Calls `visit` with a code if operand k is stored as codes; returns whether it is.
template <class Launch, class Visit>
EMOPT_FN bool with_code_of(int k, DType dtype, Visit visit) {
  constexpr uint32_t kSigned = states_with<typename Launch::Rule>(StateCode::kSigned);
  constexpr uint32_t kUnsigned = states_with<typename Launch::Rule>(StateCode::kUnsigned);
  const uint32_t state = k >= kFirstState ? 1u << (k - kFirstState) : 0u;
  if ((kSigned & state) != 0 && dtype == DType::kE4M3) {
    visit(StoredCode<E4M3>());
    return true;
  }
  if ((kUnsigned & state) != 0 && dtype == DType::kUE5M3) {
    visit(StoredCode<UE5M3>());
    return true;
  }
  return false;
}

// Calls `visit` with a value of operand k's stored type. With float32 arithmetic only the update
// may be float64, since operands that are read are not. The parameter and the weight may be a split
// master.
template <class Launch, class Visit>
EMOPT_FN void with_type_of(int k, DType dtype, Visit visit) {
  if constexpr (Launch::kHasCodes) {
    if (with_code_of<Launch>(k, dtype, visit)) return;
  }
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

// A thread's elements.
template <class Launch>
struct HeldOperands {
  using Real = typename Launch::Real;
  using Epilogue = typename Launch::Epilogue;
  static constexpr int kOperands = Launch::kOperands;
  static constexpr int kFirstWeight = kOperands - Epilogue::kOperands;
  static_assert(!Launch::kHasCodes || sizeof(Real) == sizeof(float), "codes need float32");

  // The elements after the step, in the arithmetic type.
  struct Results {
    Real values[kOperands][kHeld];
    // Of states that are stored as codes: the largest rank (CodeFormat), first of the thread's
    // elements, then of the group's.
    int32_t ranks[kOperands];
  };

  Packet<sizeof(Real)> packets[kOperands];
  uint8_t scales[kOperands];  // of states that are stored as codes

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
        packets[k].template load_singles<Place<Launch>::kStride>(from, place.remaining());
      });
    }
    if constexpr (Launch::kHasCodes) load_scales(launch, place);
  }

  EMOPT_FN void step(const Launch& launch, const Setup<Launch>& setup, const Place<Launch>& place,
                     Results& results) {
    if (!place.is_vector()) {
      for_each_read(launch, [&](int k, auto bits) {
        if constexpr (sizeof(bits) < 4) packets[k].template pack_words<decltype(bits)>();
      });
    }
    EMOPT_UNROLL
    for (int k = kGrad; k < kOperands; ++k) {
      with_type_of<Launch>(k, launch.dtype[k], [&](auto type) {
        EMOPT_UNROLL
        for (uint32_t i = 0; i < kHeld; ++i) {
          results.values[k][i] = widened<decltype(type)>(k, i);
        }
      });
    }
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      apply(setup.constants, results.values, i,
            std::make_index_sequence<kFirstWeight - kFirstState>(),
            std::make_index_sequence<Epilogue::kOperands>());
    }
    if constexpr (Launch::kHasCodes) find_ranks(launch, place, results);
  }

  // Needs the ranks of the groups. The first thread of a group stores its scales.
  EMOPT_FN void store(const Launch& launch, const Setup<Launch>& setup, const Place<Launch>& place,
                      const Results& results) {
    const uint32_t row = place.chunk.row;
    uint32_t random[kHeld];  // of two states that are stored as codes, see code_noise()
    EMOPT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_written<Epilogue, kOperands>(k, launch.data[k][row], launch.data[kUpdate][row])) {
        continue;
      }
      if (!is_stored<Epilogue, kOperands>(k, setup.constants.epilogue)) continue;
      if constexpr (Launch::kHasCodes) {
        const int state = k - kFirstState;
        if (state >= 0 && k < kFirstWeight && state % 2 == 0) {
          fill_random(random, launch, setup, place, state);
        }
      }
      with_type_of<Launch>(k, launch.dtype[k], [&](auto type) {
        using Stored = decltype(type);
        Packet<sizeof(Stored)> rounded;
        if constexpr (kIsCode<Stored>) {
          const uint32_t scale = Stored::Format::scale_for(results.ranks[k]);
          encode<typename Stored::Format>(rounded, results.values[k], scale, random,
                                          k - kFirstState);
          if (place.thread % kGroupThreads == 0) {
            *scale_at(launch, k, place) = static_cast<uint8_t>(scale);
          }
        } else if (k == kUpdate && setup.is_stochastic) {
          round_stochastically<Stored>(rounded, results.values[k], launch, setup.key, place);
        } else {
          round<Stored>(rounded, results.values[k]);
        }
        auto* const to = place.chunk.template at<BitsOf<Stored>>(launch, k, place.first());
        if (place.is_vector()) {
          rounded.store_vectors(to);
        } else {
          rounded.template store_singles<Place<Launch>::kStride>(to, place.remaining());
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
      if constexpr (Launch::kHasCodes) {
        if (with_code_of<Launch>(k, dtype, [&](auto code) { visit(k, code.bits); })) continue;
      }
      if (dtype >= DType::kBFloat16) {
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
    } else if constexpr (kIsCode<Stored>) {
      return Stored::Format::decode(packets[k].template get<uint8_t>(i), scale_of(scales[k]));
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
      const uint32_t stride = place.is_vector() ? 1 : Place<Launch>::kStride;
      EMOPT_UNROLL
      for (uint32_t i = 0; i < kHeld; ++i) {
        const uint32_t bits = random(place.first() + i * stride);
        packet.put(i, RoundStochastically<Stored>::from(static_cast<float>(values[i]), bits));
      }
    }
  }

  // ---- codes ------------------------------------------------------------------------------------

  EMOPT_FN static uint8_t* scale_at(const Launch& launch, int k, const Place<Launch>& place) {
    const int64_t group = (place.chunk.begin + place.first()) / kGroup;
    return launch.codes[place.chunk.row].scales[k - kFirstState] + group;
  }

  EMOPT_FN void load_scales(const Launch& launch, const Place<Launch>& place) {
    EMOPT_UNROLL
    for (int k = kFirstState; k < kFirstWeight; ++k) {
      with_code_of<Launch>(k, launch.dtype[k],
                           [&](auto) { scales[k] = *scale_at(launch, k, place); });
    }
  }

  EMOPT_FN static void find_ranks(const Launch& launch, const Place<Launch>& place,
                                  Results& results) {
    EMOPT_UNROLL
    for (int k = kFirstState; k < kFirstWeight; ++k) {
      with_code_of<Launch>(k, launch.dtype[k], [&](auto type) {
        using Format = typename decltype(type)::Format;
        results.ranks[k] = Format::kLowestRank;
        EMOPT_UNROLL
        for (uint32_t i = 0; i < kHeld; ++i) {
          const int32_t rank = Format::rank_of(results.values[k][i]);
          if (place.has(i) && rank > results.ranks[k]) results.ranks[k] = rank;
        }
      });
    }
  }

  // The random bits of state `state` and the next one. A thread's elements are consecutive in the
  // parameter, too, and the high 32 bits of their indices are the same.
  EMOPT_FN static void fill_random(uint32_t (&random)[kHeld], const Launch& launch,
                                   const Setup<Launch>& setup, const Place<Launch>& place,
                                   int state) {
    const StatePlace& in_param = launch.codes[place.chunk.row].place;
    const uint64_t index = in_param.index_of(place.chunk.begin + place.first());
    const StateBits bits(setup.code_keys[state / 2], index);
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) random[i] = bits(i);
  }

  template <class Format>
  EMOPT_FN static void encode(Packet<1>& packet, const Real (&values)[kHeld], uint32_t scale,
                              const uint32_t (&random)[kHeld], int state) {
    const float reciprocal = reciprocal_of_scale(scale);
    EMOPT_UNROLL
    for (uint32_t i = 0; i < kHeld; ++i) {
      const uint32_t code = Format::encode(values[i], reciprocal, code_noise(state, random[i]));
      packet.put(i, static_cast<uint8_t>(code));
    }
  }
};

}  // namespace emopt::cuda
