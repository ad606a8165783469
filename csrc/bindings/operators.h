// The operator of a rule, made from the rule's own description: its schema, its kernels and the
// call that eager Python enters through.
//
//   adam_update_(Tensor(a!)[] updates, Tensor[] grads, Tensor(b!)[] exp_avgs,
//                Tensor(c!)[] exp_avg_sqs, float[] betas, bool correct_bias, bool use_nesterov,
//                SymInt step, float eps, *, Tensor? step_tensor=None) -> ()
//
// `step_tensor` takes the place of `step` where it is given: a step that only a tensor knows.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "../engine/sweep.h"
#include "operand_checks.h"
#include "scalar_checks.h"

namespace emopt {

inline constexpr const char* kNamespace = "emerging_optimizers";

// ---- how each kind of option travels through an operator ----------------------------------------

template <class Option>
struct Travels;

template <class Rule>
struct Travels<Option<Rule, double>> {
  using Type = double;
  static constexpr const char* kSchema = "float ";
  static void put(Rule& rule, const Option<Rule, double>& option, double value) {
    rule.*option.member = value;
  }
};

template <class Rule>
struct Travels<Option<Rule, bool>> {
  using Type = bool;
  static constexpr const char* kSchema = "bool ";
  static void put(Rule& rule, const Option<Rule, bool>& option, bool value) {
    rule.*option.member = value;
  }
};

template <class Rule>
struct Travels<Option<Rule, int64_t>> {
  using Type = std::optional<int64_t>;
  static constexpr const char* kSchema = "int? ";
  static void put(Rule& rule, const Option<Rule, int64_t>& option, std::optional<int64_t> value) {
    rule.*option.member = value.value_or(0);
  }
};

template <class Rule, size_t N>
struct Travels<Option<Rule, double[N]>> {
  using Type = at::ArrayRef<double>;
  static constexpr const char* kSchema = "float[] ";
  static void put(Rule& rule, const Option<Rule, double[N]>& option, at::ArrayRef<double> values) {
    TORCH_CHECK_VALUE(values.size() == N, option.name, " has ", values.size(), " values; expected ",
                      N);
    std::copy(values.begin(), values.end(), rule.*option.member);
  }
};

template <>
struct Travels<StepArgument> {
  using Type = c10::SymInt;
};

template <size_t, class T>
using Repeat = T;

// ---- what a rule may ask for beside its arithmetic ----------------------------------------------

template <class Rule, class = void>
inline constexpr bool kHasShapeScale = false;
template <class Rule>
inline constexpr bool kHasShapeScale<Rule, std::void_t<decltype(&Rule::shape_scale)>> = true;

// The factor of one position's update.
template <class Rule>
double update_scale(const Rule& rule, at::TensorList grads, size_t position) {
  if constexpr (kHasShapeScale<Rule>) {
    if (rule.use_shape_scaling) {
      const at::Tensor& grad = grads[position];
      TORCH_CHECK_VALUE(grad.dim() == 2, position_name("grad", position), " has ", grad.dim(),
                        " dimensions; use_shape_scaling needs 2");
      return Rule::shape_scale(grad.size(0), grad.size(1));
    }
  }
  return 1.0;
}

// ---- the operator -------------------------------------------------------------------------------

// torch.jit.trace records only PyTorch's own operators: of a call, its graph would have the memory
// that was made for the result, and nothing that fills it.
[[noreturn]] inline void refuse_trace(const std::string& what) {
  TORCH_CHECK(false, "torch.jit.trace cannot record ", what,
              ": use torch.compile or torch.export, or call it outside of what is traced");
}

template <class Rule, class, class>
class OperatorOf;

template <class Rule, size_t... kState, class... Options>
class OperatorOf<Rule, std::index_sequence<kState...>, std::tuple<Options...>> {
 public:
  using Signature = void(at::TensorList, at::TensorList, Repeat<kState, at::TensorList>...,
                         typename Travels<Options>::Type..., const std::optional<at::Tensor>&);

  static std::string name() { return std::string(Rule::kName) + "_update_"; }

  static std::string schema() {
    std::string text = name() + "(Tensor(a!)[] updates, Tensor[] grads";
    char alias = 'b';
    ((text += std::string(", Tensor(") + alias++ + "!)[] " + Rule::kStates[kState] + "s"), ...);
    std::apply([&](const auto&... options) { ((text += ", " + schema_of(options)), ...); },
               Rule::options());
    return text + ", *, Tensor? step_tensor=None) -> ()";
  }

  // The operator through the dispatcher, unboxed.
  static void call(at::TensorList updates, at::TensorList grads,
                   Repeat<kState, at::TensorList>... states,
                   typename Travels<Options>::Type... options,
                   const std::optional<at::Tensor>& step_tensor) {
    static const auto handle =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow((std::string(kNamespace) + "::" + name()).c_str(), "")
            .template typed<Signature>();
    handle.call(updates, grads, states..., std::move(options)..., step_tensor);
  }

  // A call's hyperparameters, checked.
  static std::pair<Rule, Number> rule_and_step(const std::optional<at::Tensor>& step_tensor,
                                               typename Travels<Options>::Type... options) {
    Rule rule;
    int64_t step = 0;
    put_all(rule, step, std::index_sequence_for<Options...>(), options...);
    check_hyperparameters(rule);
    if constexpr (!(std::is_same_v<Options, StepArgument> || ...)) return {rule, {}};
    return {rule, checked_step(step, step_tensor, lowest_step(rule))};
  }

  // On the CPU and, where it is compiled for, on CUDA devices.
  static void native(at::TensorList updates, at::TensorList grads,
                     Repeat<kState, at::TensorList>... states,
                     typename Travels<Options>::Type... options,
                     const std::optional<at::Tensor>& step_tensor) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto rule_and_its_step = rule_and_step(step_tensor, std::move(options)...);
    const Rule& rule = rule_and_its_step.first;
    const auto lists = operand_lists(updates, grads, states...);
    check_step_device(lists, step_tensor);
    CheckedTable<kNumOperands<Rule>> checked(
        lists, [&](size_t position) { return update_scale(rule, grads, position); });
    sweep(rule, rule_and_its_step.second, StoreUpdate(), checked.table());
    checked.finish();
  }

  // Nothing to compute.
  static void meta(at::TensorList updates, at::TensorList grads,
                   Repeat<kState, at::TensorList>... states, typename Travels<Options>::Type...,
                   const std::optional<at::Tensor>& step_tensor) {
    check_all_meta(operand_lists(updates, grads, states...), step_tensor);
  }

  // Under torch.jit.trace.
  static void traced(at::TensorList, at::TensorList, Repeat<kState, at::TensorList>...,
                     typename Travels<Options>::Type..., const std::optional<at::Tensor>&) {
    refuse_trace("calculate_" + std::string(Rule::kName) + "_update");
  }

 private:
  static std::array<OperandList, kNumOperands<Rule>> operand_lists(
      at::TensorList updates, at::TensorList grads, Repeat<kState, at::TensorList>... states) {
    return {OperandList{"out", updates, true}, OperandList{"grad", grads, false},
            OperandList{Rule::kStates[kState], states, true}...};
  }

  template <class Option>
  static std::string schema_of(const Option& option) {
    return std::string(Travels<Option>::kSchema) + option.name;
  }
  static std::string schema_of(StepArgument) { return "SymInt step"; }

  template <class Option>
  static void put(Rule& rule, int64_t&, const Option& option,
                  const typename Travels<Option>::Type& value) {
    Travels<Option>::put(rule, option, value);
  }
  static void put(Rule&, int64_t& step, StepArgument, const c10::SymInt& value) {
    step = value.guard_int(__FILE__, __LINE__);
  }

  template <size_t... kOption>
  static void put_all(Rule& rule, int64_t& step, std::index_sequence<kOption...>,
                      const typename Travels<Options>::Type&... values) {
    const auto options = Rule::options();
    (put(rule, step, std::get<kOption>(options), values), ...);
  }
};

template <class Rule>
using Operator =
    OperatorOf<Rule, std::make_index_sequence<kNumStates<Rule>>, decltype(Rule::options())>;

}  // namespace emopt
