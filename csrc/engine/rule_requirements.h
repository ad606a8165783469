// What a rule's struct has to provide (rules/rule.h), checked where its unit is compiled. The first
// message that fails is what users of load_rule see (emerging_optimizers/_user_rules/cpp_rule.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "rule_info.h"
#include "rule_traits.h"

namespace emopt::requirements {

// Whether an expression of T compiles, and whether it is a constant that is true. There, `*&` keeps
// members that are not static from being errors.
#define EMOPT_HAS(kHas, expression)   \
  template <class T, class = void>    \
  inline constexpr bool kHas = false; \
  template <class T>                  \
  inline constexpr bool kHas<T, std::void_t<decltype(expression)>> = true
#define EMOPT_HAS_CONSTANT(kHas, expression) \
  template <class T, class = void>           \
  inline constexpr bool kHas = false;        \
  template <class T>                         \
  inline constexpr bool kHas<T, std::enable_if_t<static_cast<bool>(expression)>> = true

// Whether T has a member of a name, which may be overloaded, a template or private: a base that has
// one too makes the name ambiguous. A final T is no base; its member has to be a single public one.
#define EMOPT_HAS_MEMBER(kHas, name)                                                          \
  struct Other_##name {                                                                       \
    int name;                                                                                 \
  };                                                                                          \
  template <class T>                                                                          \
  struct Both_##name : T, Other_##name {};                                                    \
  template <class T, bool kIsFinal = std::is_final_v<T>, class = void>                        \
  inline constexpr bool kHas = !kIsFinal;                                                     \
  template <class T>                                                                          \
  inline constexpr bool kHas<T, false, std::void_t<decltype(&Both_##name<T>::name)>> = false; \
  template <class T>                                                                          \
  inline constexpr bool kHas<T, true, std::void_t<decltype(&T::name)>> = true

// Names of a constant array of strings.
template <size_t kCount>
constexpr bool are_names(const char* const (&names)[kCount]) {
  for (const char* name : names) {
    if (name == nullptr || *name == 0) return false;
  }
  return true;
}

// The same of scalar states.
template <size_t kCount>
constexpr bool are_scalar_states(const ScalarState (&states)[kCount]) {
  for (const ScalarState& state : states) {
    if (state.name == nullptr || *state.name == 0) return false;
  }
  return true;
}

// A constant array of codes.
template <size_t kCount>
constexpr bool are_state_codes(const StateCode (&codes)[kCount]) {
  for (const StateCode code : codes) {
    if (code > StateCode::kUnsigned) return false;
  }
  return true;
}

EMOPT_HAS(kHasName, T::kName);
EMOPT_HAS_CONSTANT(kHasConstantName, static_cast<const char*>(*&T::kName)[0] != 0);
EMOPT_HAS(kHasHyperparameters, T::hyperparameters());
EMOPT_HAS_MEMBER(kHasStates, kStates);
EMOPT_HAS_CONSTANT(kHasConstantStates, are_names(*&T::kStates));
EMOPT_HAS_MEMBER(kHasStateCodes, kStateCodes);
EMOPT_HAS_CONSTANT(kHasConstantStateCodes, are_state_codes(*&T::kStateCodes));
EMOPT_HAS_MEMBER(kHasScalarStates, kScalarStates);
EMOPT_HAS_CONSTANT(kHasConstantScalarStates, are_scalar_states(*&T::kScalarStates));
EMOPT_HAS(kAdvances, static_cast<void (T::*)(double)>(&T::advance));
EMOPT_HAS_MEMBER(kHasLowestStep, kLowestStep);
EMOPT_HAS_MEMBER(kHasNumCases, kNumCases);
EMOPT_HAS_CONSTANT(kHasConstantNumCases, *&T::kNumCases >= 1);
EMOPT_HAS_MEMBER(kHasCheck, check);
EMOPT_HAS(kChecks, std::declval<const T&>().check(std::declval<ErrorText&>()));
EMOPT_HAS_MEMBER(kHasShapeScale, shape_scale);
EMOPT_HAS(kScales, static_cast<double (*)(int64_t, int64_t)>(&T::shape_scale));
EMOPT_HAS(kHasStep, sizeof(typename T::template Step<float>));
EMOPT_HAS(kHasCase, static_cast<int>(std::declval<const T&>().which));
EMOPT_HAS_MEMBER(kHasKeepsWeight, keeps_weight);
EMOPT_HAS_CONSTANT(kHasFlag, (std::is_same_v<std::remove_cv_t<decltype(T::keeps_weight)>, bool>));

#undef EMOPT_HAS
#undef EMOPT_HAS_MEMBER
#undef EMOPT_HAS_CONSTANT

template <class T, int kValue, class = void>
inline constexpr bool kLowestStepIs = false;
template <class T, int kValue>
inline constexpr bool kLowestStepIs<T, kValue, std::enable_if_t<*&T::kLowestStep == kValue>> = true;

// 0 if kStates is not a public array.
template <class T, class = void>
inline constexpr size_t kStateCount = 0;
template <class T>
inline constexpr size_t kStateCount<T, std::void_t<decltype(T::kStates)>> =
    std::extent_v<std::remove_reference_t<decltype(T::kStates)>>;

template <class T, class = void>
inline constexpr size_t kStateCodeCount = 0;
template <class T>
inline constexpr size_t kStateCodeCount<T, std::void_t<decltype(T::kStateCodes)>> =
    std::extent_v<std::remove_reference_t<decltype(T::kStateCodes)>>;

template <class T, class = void>
inline constexpr size_t kScalarStateCount = 0;
template <class T>
inline constexpr size_t kScalarStateCount<T, std::void_t<decltype(T::kScalarStates)>> =
    std::extent_v<std::remove_reference_t<decltype(T::kScalarStates)>>;

// Whether `scalars` is a public array with a number for each scalar state.
template <class T, class = void>
inline constexpr bool kHasValues = false;
template <class T>
inline constexpr bool kHasValues<T, std::void_t<decltype(&T::scalars)>> =
    std::is_member_object_pointer_v<decltype(&T::scalars)> &&
    std::is_same_v<decltype(T::scalars), double[kScalarStateCount<T>]>;

// ---- hyperparameters ----------------------------------------------------------------------------

template <class Value>
inline constexpr bool kIsHyperparameter =
    std::is_same_v<Value, double> || std::is_same_v<Value, bool> ||
    std::is_same_v<Value, int64_t> ||
    (std::is_array_v<Value> && std::is_same_v<std::remove_extent_t<Value>, double>);

// Initializes a number, a flag or a pointer.
struct AnyScalar {
  template <class T, class = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const;
};

template <size_t, class T>
using Each = T;

// Whether a struct has at least this many numbers, flags and pointers, those of arrays included.
template <class Rule, class Sequence, class = void>
inline constexpr bool kHasScalars = false;
template <class Rule, size_t... kScalar>
inline constexpr bool kHasScalars<Rule, std::index_sequence<kScalar...>,
                                  std::void_t<decltype(Rule{Each<kScalar, AnyScalar>()...})>> =
    true;

// An entry of hyperparameters().
template <class Rule, class Entry>
struct Listed {
  static constexpr bool kIsKnown = false, kIsMember = true, kIsSupported = true, kIsStep = false;
  static constexpr size_t kNumScalars = 0;
};
template <class Rule, class Owner, class Value>
struct Listed<Rule, Hyperparameter<Owner, Value>> {
  static constexpr bool kIsKnown = true, kIsMember = std::is_base_of_v<Owner, Rule>;
  static constexpr bool kIsSupported = kIsHyperparameter<Value>, kIsStep = false;
  static constexpr size_t kNumScalars = sizeof(Value) / sizeof(std::remove_all_extents_t<Value>);
};
template <class Rule, class Owner>
struct Listed<Rule, OptionalHyperparameter<Owner>> : Listed<Rule, Hyperparameter<Owner, double>> {};
template <class Rule>
struct Listed<Rule, StepArgument> {
  static constexpr bool kIsKnown = true, kIsMember = true, kIsSupported = true, kIsStep = true;
  static constexpr size_t kNumScalars = 0;
};

template <class Rule, class List>
struct AllListed {
  static constexpr bool kAreKnown = false, kAreMembers = true, kAreSupported = true;
  static constexpr int kNumSteps = 0;
  static constexpr size_t kNumScalars = 0;
};
template <class Rule, class... Entry>
struct AllListed<Rule, std::tuple<Entry...>> {
  static constexpr bool kAreKnown = (Listed<Rule, Entry>::kIsKnown && ...);
  static constexpr bool kAreMembers = (Listed<Rule, Entry>::kIsMember && ...);
  static constexpr bool kAreSupported = (Listed<Rule, Entry>::kIsSupported && ...);
  static constexpr int kNumSteps = (0 + ... + (Listed<Rule, Entry>::kIsStep ? 1 : 0));
  static constexpr size_t kNumScalars = (size_t{0} + ... + Listed<Rule, Entry>::kNumScalars);
};

// ---- calls of a step ----------------------------------------------------------------------------

// Whether an element's update can be computed with states of type Real.
template <class Step, class Real, size_t... kState>
constexpr bool takes(std::index_sequence<kState...>) {
  return std::is_invocable_v<Step, Real, Each<kState, Real&>...>;
}
// For any number of states up to the last one of the sequence.
template <class Step, class Real, size_t... kCount>
constexpr bool takes_any_of(std::index_sequence<kCount...>) {
  return (takes<Step, Real>(std::make_index_sequence<kCount>()) || ...);
}

// Whether a state could be a temporary: what is assigned to it would be lost.
template <class Step, class Real, size_t kCopied, size_t... kState>
constexpr bool copies_state(std::index_sequence<kState...>) {
  return std::is_invocable_v<Step, Real, std::conditional_t<kState == kCopied, Real, Real&>...>;
}
template <class Step, class Real, size_t... kState>
constexpr bool copies_any_state([[maybe_unused]] std::index_sequence<kState...> states) {
  return (copies_state<Step, Real, kState>(states) || ...);
}

template <class Step, class Real, size_t... kState>
constexpr bool returns_update(std::index_sequence<kState...>) {
  return std::is_same_v<std::invoke_result_t<Step, Real, Each<kState, Real&>...>, Real>;
}

template <class Step, class Real, class Sequence, class = void>
inline constexpr bool kComputes = false;
template <class Step, class Real, size_t... kState>
inline constexpr bool
    kComputes<Step, Real, std::index_sequence<kState...>,
              std::void_t<decltype(std::declval<Step>().template compute<0>(
                  std::declval<Real>(), std::declval<Each<kState, Real&>>()...))>> = true;

// ---- all of it ----------------------------------------------------------------------------------

template <class Rule, class Real>
struct StepRequirements {
  using Step = typename Rule::template Step<Real>;
  using States = std::make_index_sequence<kStateCount<Rule>>;
  using UpToMost = std::make_index_sequence<kMaxStates + 1>;

  static_assert(std::is_constructible_v<Step, const Rule&, double>,
                "Step has no constructor that takes the rule and the step number: add"
                " EMOPT_FN Step(const MyRule& rule, double step)");
  static_assert(std::is_trivially_copyable_v<Step> && std::is_trivially_destructible_v<Step>,
                "Step has a member that is neither a number nor a flag: it is copied as bytes");
  static_assert(sizeof(Step) <= kMaxConstantsBytes,
                "Step has more than 512 bytes: store fewer constants");
  static_assert(alignof(Step) <= 16, "Step is aligned to more than 16 bytes: remove alignas");
  static_assert(takes_any_of<Step&, Real>(UpToMost()),
                "Step has no operator() that takes a gradient and states of type Real: add"
                " EMOPT_FN Real operator()(Real grad, Real& exp_avg) const");
  static_assert(takes_any_of<const Step&, Real>(UpToMost()),
                "operator() of Step is not const: add const after its arguments");
  static_assert(kHasStates<Rule> || takes<const Step&, Real>(std::index_sequence<>()),
                "kStates is missing, but operator() of Step takes states: add static constexpr"
                " const char* kStates[] = {\"exp_avg\"};");
  static_assert(takes<const Step&, Real>(States()),
                "operator() of Step takes another number of states than kStates has names");
  static_assert(!copies_any_state<const Step&, Real>(States()),
                "operator() of Step takes a state by value or as const, so its new value would be"
                " lost: take Real&");
  static_assert(returns_update<const Step&, Real>(States()),
                "operator() of Step does not return the update, a Real");
  static_assert(!kHasNumCases<Rule> || kHasCase<Step>,
                "the rule has kNumCases, but Step has no int which, the case of the step");
  static_assert(!kHasNumCases<Rule> || kComputes<const Step&, Real, States>,
                "the rule has kNumCases, but Step has no template <int kCase> Real compute(...)"
                " const with the arguments of operator()");
  static_assert(!kHasKeepsWeight<Step> || kHasFlag<Step>,
                "keeps_weight is private or not a bool: write bool keeps_weight; and set it in the"
                " constructor of Step");
};

template <class Rule>
struct RuleRequirements {
  static_assert(
      kHasName<Rule>,
      "kName is missing or private: add static constexpr const char* kName = \"my_rule\";");
  static_assert(kHasConstantName<Rule>,
                "kName is not a constant string: write static constexpr const char* kName");
  static_assert(kHasHyperparameters<Rule>,
                "hyperparameters() is missing, private, not static or takes arguments: add static"
                " constexpr auto hyperparameters() { return std::make_tuple(...); }");
  using List = AllListed<Rule, std::decay_t<decltype(Rule::hyperparameters())>>;
  static_assert(List::kAreKnown,
                "hyperparameters() does not return a std::tuple of hyperparameter(...),"
                " optional_hyperparameter(...) and StepArgument{}");
  static_assert(List::kAreMembers, "hyperparameters() lists a member of another struct");
  static_assert(List::kAreSupported,
                "hyperparameters() lists a member of an unsupported type: use double, double[N],"
                " bool or int64_t");
  static_assert(List::kNumSteps <= 1, "hyperparameters() lists StepArgument{} more than once");
  static_assert(sizeof(Rule) <= kMaxRuleBytes,
                "the struct has more than 256 bytes: use fewer hyperparameters");
  static_assert(std::is_trivially_copyable_v<Rule> && alignof(Rule) <= 8,
                "the struct has a member that is neither a number nor a flag, or a virtual"
                " function: it is copied as bytes");
  static_assert(
      !kHasStates<Rule> || (kHasConstantStates<Rule> && kStateCount<Rule> != 0),
      "kStates is private or not a constant array of strings: write static constexpr const char*"
      " kStates[] = {\"exp_avg\"}; or leave it out if there are no states");
  static_assert(kStateCount<Rule> <= kMaxStates,
                "kStates has too many names: a rule has at most 5 states");
  static_assert(!kHasStateCodes<Rule> || kHasConstantStateCodes<Rule>,
                "kStateCodes is private or not a constant array: write static constexpr StateCode"
                " kStateCodes[] = {StateCode::kSigned}; or leave it out");
  static_assert(!kHasStateCodes<Rule> || kStateCodeCount<Rule> == kStateCount<Rule>,
                "kStateCodes has another length than kStates: list a code for each state,"
                " StateCode::kNone for one that is not stored in 8 bits");
  static_assert(!kHasScalarStates<Rule> ||
                    (kHasConstantScalarStates<Rule> && kScalarStateCount<Rule> != 0),
                "kScalarStates is private or not a constant array: write static constexpr"
                " ScalarState kScalarStates[] = {{\"mu_product\", 1.0}}; or leave it out");
  static_assert(kScalarStateCount<Rule> <= kMaxScalarStates,
                "kScalarStates has too many names: a rule has at most 4 scalar states");
  static_assert(!kHasScalarStates<Rule> || kHasValues<Rule>,
                "the rule has kScalarStates, but no public member double scalars[N] with a number"
                " for each of them");
  static_assert(!kHasScalarStates<Rule> || kAdvances<Rule>,
                "the rule has kScalarStates, but no public EMOPT_FN void advance(double step) that"
                " sets scalars to their values after the step");
  static_assert(!kHasLowestStep<Rule> || kLowestStepIs<Rule, 0> || kLowestStepIs<Rule, 1>,
                "kLowestStep is private or neither of the constants 0 and 1: write static constexpr"
                " int kLowestStep = 1; or leave it out if steps count from 0");
  static_assert(!kHasNumCases<Rule> || kHasConstantNumCases<Rule>,
                "kNumCases is private or not a constant of at least 1");
  static_assert(
      !kHasCheck<Rule> || kChecks<Rule>,
      "check() is private or takes other arguments: write void check(ErrorText& error) const");
  static_assert(!kHasShapeScale<Rule> || kScales<Rule>,
                "shape_scale() is private or takes other arguments: write static double"
                " shape_scale(int64_t rows, int64_t cols)");
  static_assert(std::is_trivially_default_constructible_v<Rule>,
                "the struct has a constructor, or a member with a value, which would have no"
                " effect: make constants static constexpr, and pass defaults in Python");
  static_assert(std::is_aggregate_v<Rule>,
                "the struct has a member or a base that is private: make it public");
  static_assert(
      !kHasScalars<Rule, std::make_index_sequence<List::kNumScalars + kScalarStateCount<Rule> + 1>>,
      "the struct has a member that hyperparameters() does not list, so nothing would set"
      " it");
  static_assert(kHasStep<Rule>,
                "Step is missing, private or not a template of one type: add template <class Real>"
                " struct Step { ... };");
  static_assert(sizeof(StepRequirements<Rule, float>) != 0);
  static_assert(sizeof(StepRequirements<Rule, double>) != 0);
};

}  // namespace emopt::requirements
