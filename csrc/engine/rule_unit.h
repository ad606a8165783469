// A rule's unit: all code that is compiled once for each rule. Independent of torch.
//
//   #include "rules/adam.h"
//   #include "engine/rule_unit.h"
//   EMOPT_RULE(Adam)
//
// defines `emopt_rule_Adam()`, which returns the rule's RuleInfo, in the package or in a shared
// library. If EMOPT_CUDA is set, a unit compiled by nvcc has its kernels (cuda/kernel.h). A library
// for one machine may have the loops of one instruction set only (cpu/for_each_isa.inl).
#pragma once

#include <array>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "prefetch.h"
#include "rule_info.h"
#include "rule_requirements.h"
#if EMOPT_CUDA
#include "cuda/enqueue_rows.h"
#endif

#define EMOPT_INCLUDE "element_loop.inl"
#include "cpu/for_each_isa.inl"
#undef EMOPT_INCLUDE

namespace emopt::unit {

// ---- the rule's description ---------------------------------------------------------------------

// `Owner` is the rule, or a base of it.
template <class Rule, class Owner, class Value>
HyperparameterInfo describe(const Hyperparameter<Owner, Value>& hyperparameter) {
  constexpr Kind kKind = std::is_array_v<Value>           ? Kind::kFloats
                         : std::is_same_v<Value, bool>    ? Kind::kFlag
                         : std::is_same_v<Value, int64_t> ? Kind::kWarmupSteps
                                                          : Kind::kFloat;
  static const Rule rule{};
  const auto address = [](const void* at) { return static_cast<const char*>(at); };
  const auto offset = address(&(rule.*hyperparameter.member)) - address(&rule);
  constexpr size_t kLength = std::is_array_v<Value> ? std::extent_v<Value> : 1;
  return {hyperparameter.name, kKind, hyperparameter.domain, static_cast<uint16_t>(kLength),
          static_cast<uint32_t>(offset)};
}
template <class Rule, class Owner>
HyperparameterInfo describe(const OptionalHyperparameter<Owner>& hyperparameter) {
  using Number = Hyperparameter<Owner, double>;
  HyperparameterInfo info =
      describe<Rule>(Number{hyperparameter.name, hyperparameter.member, hyperparameter.domain});
  info.kind = Kind::kOptionalFloat;
  return info;
}
template <class Rule>
HyperparameterInfo describe(StepArgument) {
  return {"step", Kind::kStep, Domain::kAny, 1, 0};
}

inline int32_t offset_of_flag(const HyperparameterInfo* begin, size_t count, const char* name) {
  for (size_t i = 0; i < count; ++i) {
    if (begin[i].kind == Kind::kFlag && std::strcmp(begin[i].name, name) == 0) {
      return static_cast<int32_t>(begin[i].offset);
    }
  }
  return -1;
}

template <class Rule, class = void>
inline constexpr const char* const* kStatesOf = nullptr;
template <class Rule>
inline constexpr const char* const* kStatesOf<Rule, std::void_t<decltype(Rule::kStates)>> =
    Rule::kStates;

template <class Rule, class = void>
inline constexpr int kLowestStep = 0;
template <class Rule>
inline constexpr int kLowestStep<Rule, std::void_t<decltype(Rule::kLowestStep)>> =
    Rule::kLowestStep;

template <class Rule, class = void>
inline constexpr decltype(RuleInfo::check) kCheck = nullptr;
template <class Rule>
inline constexpr decltype(RuleInfo::check)
    kCheck<Rule, std::enable_if_t<requirements::kChecks<Rule>>> =
        [](const void* rule, ErrorText& error) { static_cast<const Rule*>(rule)->check(error); };

template <class Rule, class = void>
inline constexpr decltype(RuleInfo::shape_scale) kShapeScale = nullptr;
template <class Rule>
inline constexpr decltype(RuleInfo::shape_scale)
    kShapeScale<Rule, std::enable_if_t<requirements::kScales<Rule>>> = &Rule::shape_scale;

template <class Rule>
constexpr const ScalarState* scalar_states_of() {
  if constexpr (kNumScalarStates<Rule> != 0) {
    return Rule::kScalarStates;
  } else {
    return nullptr;
  }
}

template <class Rule>
uint32_t offset_of_scalars() {
  if constexpr (kNumScalarStates<Rule> != 0) {
    static Rule rule{};
    const auto offset =
        reinterpret_cast<const char*>(scalars_of(rule)) - reinterpret_cast<const char*>(&rule);
    return static_cast<uint32_t>(offset);
  } else {
    return 0;
  }
}

// ---- the rule's code ----------------------------------------------------------------------------

template <class Rule, class Real>
void make_constants(const RuleInstance& rule, double step, void* constants) {
  using Step = typename Rule::template Step<Real>;
  new (constants) Step(*reinterpret_cast<const Rule*>(rule.bytes), step);
}

template <class Rule>
constexpr decltype(RuleInfo::advance) advance_of() {
  if constexpr (kNumScalarStates<Rule> != 0) {
    return
        [](RuleInstance& rule, double step) { reinterpret_cast<Rule*>(rule.bytes)->advance(step); };
  } else {
    return nullptr;
  }
}

template <class Step>
constexpr bool (*keeps_weight_of())(const void* constants) {
  if constexpr (kMayKeepWeight<Step>) {
    return [](const void* constants) { return static_cast<const Step*>(constants)->keeps_weight; };
  } else {
    return nullptr;
  }
}

template <class Rule, class Epilogue, class Real>
constexpr EnqueueRows enqueue_rows() {
#if EMOPT_CUDA
  return &cuda::enqueue_rows<Rule, Epilogue, Real>;
#else
  return nullptr;
#endif
}

template <class Rule>
constexpr EnqueueRows enqueue_codes() {
#if EMOPT_CUDA
  if constexpr (kMayHaveCodes<Rule>) return &cuda::enqueue_rows<Rule, ApplyUpdate, float, true>;
#endif
  return nullptr;
}

#define EMOPT_LOOPS_WITH(isa, Epilogue) \
  {&cpu::isa::element_loop<Rule, Epilogue, float>, &cpu::isa::element_loop<Rule, Epilogue, double>}
#define EMOPT_LOOPS(isa) {EMOPT_LOOPS_WITH(isa, StoreUpdate), EMOPT_LOOPS_WITH(isa, ApplyUpdate)}

template <class Rule>
RuleInfo make_info() {
  static_assert(sizeof(requirements::RuleRequirements<Rule>) != 0);
  static const auto hyperparameters = std::apply(
      [](const auto&... each) {
        return std::array<HyperparameterInfo, sizeof...(each)>{describe<Rule>(each)...};
      },
      Rule::hyperparameters());
  const auto offset = [](const char* name) {
    return offset_of_flag(hyperparameters.data(), hyperparameters.size(), name);
  };
  using Float = typename Rule::template Step<float>;
  using Double = typename Rule::template Step<double>;
  return {
      EMOPT_ABI,
      Rule::kName,
      kStatesOf<Rule>,
      hyperparameters.data(),
      static_cast<uint32_t>(kNumStates<Rule>),
      static_cast<uint32_t>(hyperparameters.size()),
      sizeof(Rule),
      offset("correct_bias"),
      offset("use_shape_scaling"),
      kLowestStep<Rule>,
      kShapeScale<Rule>,
      kCheck<Rule>,
      kStateCodesOf<Rule>,
      scalar_states_of<Rule>(),
      static_cast<uint32_t>(kNumScalarStates<Rule>),
      offset_of_scalars<Rule>(),
      advance_of<Rule>(),
      {sizeof(Float), sizeof(Double)},
      {&make_constants<Rule, float>, &make_constants<Rule, double>},
      {keeps_weight_of<Float>(), keeps_weight_of<Double>()},
      {
#if EMOPT_COMPILES_BASELINE
          EMOPT_LOOPS(baseline),
#else
          {},
#endif
#if EMOPT_COMPILES_AVX2
          EMOPT_LOOPS(avx2),
#else
          {},
#endif
#if EMOPT_COMPILES_AVX512
          EMOPT_LOOPS(avx512),
#else
          {},
#endif
      },
      {{enqueue_rows<Rule, StoreUpdate, float>(), enqueue_rows<Rule, StoreUpdate, double>()},
       {enqueue_rows<Rule, ApplyUpdate, float>(), enqueue_rows<Rule, ApplyUpdate, double>()}},
      enqueue_codes<Rule>(),
      nullptr,
      nullptr,
      nullptr,
  };
}

#undef EMOPT_LOOPS
#undef EMOPT_LOOPS_WITH

}  // namespace emopt::unit

#if defined(_WIN32)
#define EMOPT_EXPORT __declspec(dllexport)
#else
#define EMOPT_EXPORT __attribute__((visibility("default")))
#endif

#define EMOPT_RULE(Rule)                                                       \
  extern "C" EMOPT_EXPORT const emopt::RuleInfo* emopt_rule_##Rule() {         \
    static const emopt::RuleInfo info = emopt::unit::make_info<emopt::Rule>(); \
    return &info;                                                              \
  }
