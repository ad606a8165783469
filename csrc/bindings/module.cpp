// The extension module: operators for PyTorch, and the door through which eager Python enters them.
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <unordered_set>

#include "operators.h"
#include "optimizer_step.h"
#include "python_arguments.h"

namespace emopt {

namespace {

// ---- operators ----------------------------------------------------------------------------------

TORCH_LIBRARY(emerging_optimizers, m) {
#define EMOPT_DEFINE(Rule) m.def(Operator<Rule>::schema().c_str(), {at::Tag::pt2_compliant_tag});
  EMOPT_FOR_EACH_RULE(EMOPT_DEFINE)
#undef EMOPT_DEFINE
}

#define EMOPT_IMPLEMENT(Rule) \
  m.impl(Operator<Rule>::name().c_str(), TORCH_FN(Operator<Rule>::native));
TORCH_LIBRARY_IMPL(emerging_optimizers, CPU, m){EMOPT_FOR_EACH_RULE(EMOPT_IMPLEMENT)}
#if EMOPT_CUDA
TORCH_LIBRARY_IMPL(emerging_optimizers, CUDA, m){EMOPT_FOR_EACH_RULE(EMOPT_IMPLEMENT)}
#endif
#undef EMOPT_IMPLEMENT

TORCH_LIBRARY_IMPL(emerging_optimizers, Meta, m) {
#define EMOPT_IMPLEMENT(Rule) \
  m.impl(Operator<Rule>::name().c_str(), TORCH_FN(Operator<Rule>::meta));
  EMOPT_FOR_EACH_RULE(EMOPT_IMPLEMENT)
#undef EMOPT_IMPLEMENT
}

// Where torch.jit.trace records.
TORCH_LIBRARY_IMPL(emerging_optimizers, Tracer, m) {
#define EMOPT_IMPLEMENT(Rule) \
  m.impl(Operator<Rule>::name().c_str(), TORCH_FN(Operator<Rule>::traced));
  EMOPT_FOR_EACH_RULE(EMOPT_IMPLEMENT)
#undef EMOPT_IMPLEMENT
}

// An optimizer's step is not differentiated. Without this, PyTorch's own fallback would box all
// lists, tensor by tensor, only to find nothing to record.
TORCH_LIBRARY_IMPL(emerging_optimizers, Autograd, m) {
#define EMOPT_IMPLEMENT(Rule) \
  m.impl(Operator<Rule>::name().c_str(), torch::CppFunction::makeFallthrough());
  EMOPT_FOR_EACH_RULE(EMOPT_IMPLEMENT)
#undef EMOPT_IMPLEMENT
}

// ---- the eager door -----------------------------------------------------------------------------

// How each kind of option is read from Python, and passed on.
template <class Rule>
double read(const Option<Rule, double>& option, py::handle value) {
  return read_number(option.name, value);
}
template <class Rule>
bool read(const Option<Rule, bool>& option, py::handle value) {
  return read_flag(option.name, value);
}
template <class Rule>
std::optional<int64_t> read(const Option<Rule, int64_t>& option, py::handle value) {
  return read_warmup_steps(option.name, value);
}
template <class Rule, size_t N>
c10::SmallVector<double, 3> read(const Option<Rule, double[N]>& option, py::handle value) {
  return read_numbers(option.name, value);
}
StepValue read(StepArgument, py::handle value) { return read_step(value); }

template <class T>
const T& passed_on(const T& value) {
  return value;
}
const c10::SymInt& passed_on(const StepValue& value) { return value.step; }

template <class T>
void take_step_tensor(std::optional<at::Tensor>&, const T&) {}
void take_step_tensor(std::optional<at::Tensor>& tensor, const StepValue& value) {
  tensor = value.tensor;
}

// Updates that the user gave no memory for, and what is returned for them.
struct NewUpdates {
  std::vector<at::Tensor> tensors;
  py::object python;
};

py::object wrapped(const at::Tensor& tensor) {
  auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  if (!object) throw py::error_already_set();
  return object;
}

NewUpdates new_updates(const TensorArgument& grads, const TensorArgument& states) {
  NewUpdates updates;
  const size_t count = grads.tensors().size();
  updates.tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    check_storage(grads.name(), grads.tensors()[i], i);
    check_storage(states.name(), states.tensors()[i], i);
    updates.tensors.push_back(empty_update(grads.tensors()[i], states.tensors()[i]));
  }
  if (grads.is_single()) {
    updates.python = wrapped(updates.tensors[0]);
    return updates;
  }
  py::list list(count);
  for (size_t i = 0; i < count; ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i),
                    wrapped(updates.tensors[i]).release().ptr());
  }
  updates.python = std::move(list);
  return updates;
}

template <class Rule, class, class>
struct DoorOf;

template <class Rule, size_t... kState, size_t... kOption>
struct DoorOf<Rule, std::index_sequence<kState...>, std::index_sequence<kOption...>> {
  // The function's arguments in their documented order, then `out`.
  static py::object update(py::handle grad, Repeat<kState, py::handle>... states,
                           Repeat<kOption, py::handle>... options, py::handle out) {
    const SingleTensorCall messages(THPVariable_Check(grad.ptr()));
    const TensorArgument grads("grad", grad);
    const TensorArgument state[] = {{Rule::kStates[kState], states}...};
    for (const TensorArgument& list : state) check_same_kind(grads, list);

    const auto described = Rule::options();
    // In braces, which are evaluated in order.
    const std::tuple values{read(std::get<kOption>(described), options)...};
    std::optional<at::Tensor> step_tensor;
    (take_step_tensor(step_tensor, std::get<kOption>(values)), ...);

    std::optional<TensorArgument> given;
    NewUpdates fresh;
    if (out.is_none()) {
      fresh = new_updates(grads, state[0]);
    } else {
      given.emplace("out", out);
      check_same_kind(grads, *given);
    }
    const at::TensorList updates = given ? given->tensors() : at::TensorList(fresh.tensors);
    if (updates.empty()) {
      Operator<Rule>::rule_and_step(step_tensor, passed_on(std::get<kOption>(values))...);
    } else {
      const py::gil_scoped_release without_gil;
      Operator<Rule>::call(updates, grads.tensors(), state[kState].tensors()...,
                           passed_on(std::get<kOption>(values))..., step_tensor);
    }
    return given ? py::reinterpret_borrow<py::object>(out) : std::move(fresh.python);
  }
};

template <class Rule>
using Door = DoorOf<Rule, std::make_index_sequence<kNumStates<Rule>>,
                    std::make_index_sequence<std::tuple_size_v<decltype(Rule::options())>>>;

// ---- the optimizers' step -----------------------------------------------------------------------

WeightDecay read_method(py::handle value) {
  const auto is = [&](const char* name) {
    return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), name) == 0;
  };
  if (is("decoupled")) return WeightDecay::kDecoupled;
  if (is("independent")) return WeightDecay::kIndependent;
  if (is("l2")) return WeightDecay::kL2;
  if (is("palm")) return WeightDecay::kPalm;
  TORCH_CHECK_VALUE(false, "Invalid weight_decay_method: ", py::repr(value).cast<std::string>(),
                    "; expected one of 'decoupled', 'independent', 'palm', 'l2'");
}

template <class Rule, class>
struct StepOf;

template <class Rule, size_t... kOption>
struct StepOf<Rule, std::index_sequence<kOption...>> {
  // Steps the parameters of groups that have a gradient.
  //
  //   state            a dictionary of their states' dictionaries
  //   groups           the optimizer's own dictionaries
  //   positions        the number, in the optimizer, of each group's first parameter
  //   keys             where a group has the rule's options, but for the step, in their order: a
  //                    key; or (key, index, length), of numbers that are there
  //   state_names      the keys of the states, in the rule's order
  //   arguments        (grad_multiplier, grad_scale, found_inf, seed), of which the first three may
  //                    be None, for 1, 1 and 0
  //   grads            None, or for each group a list of what to take as the parameters' gradients
  //   may_leave        whether what has to be stepped otherwise may be left
  //
  // A hyperparameter that is none raises before anything is changed; the caller then says which.
  //
  // Returns None where all are stepped, or for each group the indices of those that are left. Then
  // the others are stepped if `may_leave`, and if no group has fused=True and any left; or else
  // nothing is done. All are left where one of PyTorch's tracers is to see each operation.
  static py::object step(const py::dict& state, const py::list& groups, const py::list& positions,
                         const py::tuple& keys, const py::tuple& state_names,
                         const py::tuple& arguments, py::handle grads, bool may_leave) {
    const at::NoGradGuard no_grad;  // here, where it takes no microseconds
    if (torch::jit::tracer::isTracing()) refuse_trace("an optimizer's step");
    if (is_seen_by_tracer()) return py::cast(all_params(groups));
    StepNumbers numbers{{"grad_multiplier", py::object(arguments[0]), 1.0},
                        {"grad_scale", py::object(arguments[1]), 1.0},
                        {"found_inf", py::object(arguments[2]), 0.0}};
    const auto seed = arguments[3].cast<uint64_t>();
    typename GroupStep<Rule>::StateNames names;
    TORCH_CHECK_VALUE(state_names.size() == names.size(), "state_names has ", state_names.size(),
                      " names; expected ", names.size());
    for (size_t i = 0; i < names.size(); ++i) names[i] = state_names[i].ptr();

    // First what may run Python's code or raise: while parameters are walked, nothing may change.
    const size_t num_groups = groups.size();
    std::vector<GroupStep<Rule>> steps;
    steps.reserve(num_groups);
    for (size_t i = 0; i < num_groups; ++i) {
      const py::object group = groups[i];
      const auto first_position = positions[i].template cast<uint32_t>();
      steps.emplace_back(rule_of(group, keys), options_of(group, first_position, seed), names,
                         numbers, params_of(group), grads_of(grads, i));
    }

    StateWalk states(state.ptr());
    Left left(num_groups);
    for (size_t i = 0; i < num_groups; ++i) left[i] = steps[i].take(states, !may_leave);
    uint32_t num_waves = 1;
    if (may_run(steps, left, may_leave)) num_waves = settle(steps, left, state);
    if (may_run(steps, left, may_leave)) run(steps, num_waves);
    if (!is_any(left)) return py::none();
    return py::cast(left);
  }

 private:
  // As emerging_optimizers/_hyperparameters.py has it.
  static constexpr double kLowestRate = -1e-12;
  // Whether each operation has to be one that PyTorch sees: with a FakeTensorMode, for one, nothing
  // is to be computed.
  static bool is_seen_by_tracer() {
    using c10::impl::TorchDispatchModeKey;
    using c10::impl::TorchDispatchModeTLS;
    if (!TorchDispatchModeTLS::any_modes_set()) return false;
    constexpr std::array kKeys = {TorchDispatchModeKey::FAKE, TorchDispatchModeKey::PROXY,
                                  TorchDispatchModeKey::FUNCTIONAL};
    return std::any_of(kKeys.begin(), kKeys.end(), [](TorchDispatchModeKey key) {
      return TorchDispatchModeTLS::get_mode(key).has_value();
    });
  }

  static std::vector<std::vector<size_t>> all_params(const py::list& groups) {
    std::vector<std::vector<size_t>> indices;
    for (const py::handle group : groups) {
      indices.emplace_back(params_of(group).size());
      std::iota(indices.back().begin(), indices.back().end(), size_t{0});
    }
    return indices;
  }

  // Elements from which on it pays to let other threads run.
  static constexpr int64_t kWorthTheGil = 1 << 18;

  using Left = std::vector<std::vector<Py_ssize_t>>;  // by group

  static bool is_any(const Left& left) {
    return std::any_of(left.begin(), left.end(), [](const auto& group) { return !group.empty(); });
  }
  static bool may_run(const std::vector<GroupStep<Rule>>& steps, const Left& left, bool may_leave) {
    for (size_t i = 0; i < steps.size(); ++i) {
      if (!left[i].empty() && (!may_leave || steps[i].must_be_native())) return false;
    }
    return true;
  }

  // Finds what shares memory, and leaves what cannot be stepped natively in its order. Returns the
  // number of waves.
  static uint32_t settle(std::vector<GroupStep<Rule>>& steps, Left& left, const py::dict& state) {
    const auto owns_alone = [](const auto& step) { return step.owns_memory_alone(); };
    if (!is_any(left) && std::all_of(steps.begin(), steps.end(), owns_alone)) return 1;
    std::vector<StepOperand> operands;
    std::unordered_set<PyObject*> seen;
    for (size_t i = 0; i < steps.size() && is_any(left); ++i) {
      steps[i].append_left(operands, left[i], state.ptr(), seen);
    }
    const auto each_range = [&](auto& visitor) {
      for (const GroupStep<Rule>& step : steps) step.each_modified(visitor);
      visitor.start_list();
      for (const StepOperand& other : operands) {
        if (other.is_modified()) visitor.modify(other.view.range);
      }
      for (const GroupStep<Rule>& step : steps) step.each_read(visitor);
      for (const StepOperand& other : operands) {
        if (!other.is_modified()) visitor.read(other.view.range);
      }
    };
    size_t count = operands.size();
    for (const GroupStep<Rule>& step : steps) count += step.max_ranges();
    if (are_surely_apart(each_range, count)) return 1;
    std::vector<char> is_left;
    for (size_t i = 0; i < steps.size(); ++i) {
      steps[i].append_taken(operands);
      const size_t end = steps[i].position_of(static_cast<Py_ssize_t>(steps[i].num_params()));
      is_left.resize(std::max(is_left.size(), end));
      for (const Py_ssize_t index : left[i]) is_left[steps[i].position_of(index)] = true;
    }
    const StepOrder order(std::move(operands), std::move(is_left));
    for (size_t i = 0; i < steps.size(); ++i) steps[i].settle(order, left[i]);
    return order.num_waves();
  }

  static void run(std::vector<GroupStep<Rule>>& steps, uint32_t num_waves) {
    int64_t numel = 0;
    bool any_on_device = false;
    for (GroupStep<Rule>& step : steps) {
      step.bump_versions();
      numel += step.numel();
      any_on_device |= step.any_on_device();
    }
    std::vector<c10::intrusive_ptr<c10::StorageImpl>> owned;
    std::optional<py::gil_scoped_release> without_gil;
    if (numel >= kWorthTheGil || any_on_device) {
      for (const GroupStep<Rule>& step : steps) step.own(owned);
      without_gil.emplace();
    }
    for (uint32_t wave = 0; wave < num_waves; ++wave) {
      for (GroupStep<Rule>& step : steps) step.sweep(wave);
    }
  }

  static Rule rule_of(py::handle group, const py::tuple& keys) {
    const auto described = Rule::options();
    Py_ssize_t next = 0;
    // In braces, which are evaluated in order.
    const std::tuple values{read_next(group, keys, next, std::get<kOption>(described))...};
    return Operator<Rule>::rule_and_step({}, passed_on(std::get<kOption>(values))...).first;
  }

  template <class Described>
  static auto read_next(py::handle group, const py::tuple& keys, Py_ssize_t& next,
                        const Described& option) {
    PyObject* const key = PyTuple_GetItem(keys.ptr(), next++);
    if (key == nullptr) throw py::error_already_set();
    if (!PyTuple_Check(key)) return read(option, item(group, key));
    const auto place = py::reinterpret_borrow<py::tuple>(key);
    const auto name = place[0].cast<std::string>();
    const auto numbers = read_numbers(name.c_str(), item(group, place[0].ptr()));
    TORCH_CHECK_VALUE(numbers.size() == place[2].cast<size_t>(), name, " has ", numbers.size(),
                      " values; expected ", place[2].cast<size_t>());
    return read(option, py::float_(numbers[place[1].cast<size_t>()]));
  }
  // Each parameter has its own.
  static StepValue read_next(py::handle, const py::tuple&, Py_ssize_t&, StepArgument) {
    return {c10::SymInt(1), {}};
  }

  static GroupOptions options_of(py::handle group, uint32_t first_position, uint64_t seed) {
    static PyObject* const lr = interned("lr");
    static PyObject* const weight_decay = interned("weight_decay");
    static PyObject* const method = interned("weight_decay_method");
    static PyObject* const maximize = interned("maximize");
    static PyObject* const stochastic_rounding = interned("stochastic_rounding");
    static PyObject* const master_weights = interned("master_weights");
    static PyObject* const remainders = interned("store_param_remainders");
    static PyObject* const capturable = interned("capturable");
    static PyObject* const fused = interned("fused");
    static PyObject* const foreach = interned("foreach");
    static PyObject* const differentiable = interned("differentiable");
    static PyObject* const step = interned("step");
    TORCH_CHECK_VALUE(!flag(group, differentiable), "does not support differentiable=True");
    ApplyUpdate epilogue;
    epilogue.weight_decay = read_number("weight_decay", item(group, weight_decay));
    check_domain("weight_decay", -1, epilogue.weight_decay, Domain::kNonNegative);
    epilogue.method = read_method(item(group, method));
    epilogue.maximize = flag(group, maximize);
    epilogue.is_stochastic = flag(group, stochastic_rounding);
    epilogue.seed = seed;
    Scalar rate("lr", item(group, lr));
    // Schedulers reach 0 by sums that rounding takes below it.
    if (!rate.is_on_device() && !(rate.on(kHost).value >= kLowestRate)) {
      check_domain("lr", -1, rate.on(kHost).value, Domain::kNonNegative);
    }
    const bool has_masters = flag(group, master_weights);
    TORCH_CHECK_VALUE(!has_masters || !epilogue.is_stochastic,
                      "master_weights and stochastic_rounding cannot be combined");
    const bool must_be_native = flag(group, fused, Py_None);
    TORCH_CHECK_VALUE(!flag(group, foreach, Py_None) || !must_be_native,
                      "`fused` and `foreach` cannot be `True` together.");
    // Groups of emerging_optimizers.megatron have this key, and a step that counts.
    const bool is_counted = PyDict_Contains(group.ptr(), remainders) == 1;
    std::optional<double> count;
    if (is_counted) {
      PyObject* const number = PyDict_GetItemWithError(group.ptr(), step);
      if (number != nullptr && PyLong_Check(number)) count = PyLong_AsDouble(number);
    }
    return {std::move(rate),
            epilogue,
            has_masters,
            flag(group, remainders),
            flag(group, capturable),
            must_be_native,
            first_position,
            is_counted,
            count};
  }

  // Of our own: another thread may change the list.
  static py::tuple params_of(py::handle group) {
    static PyObject* const key = interned("params");
    auto params = py::reinterpret_steal<py::tuple>(PySequence_Tuple(item(group, key).ptr()));
    if (!params) throw py::error_already_set();
    return params;
  }

  // Empty where there is no list.
  static py::tuple grads_of(py::handle grads, size_t group) {
    return grads.is_none() ? py::tuple() : py::tuple(grads[py::int_(group)]);
  }

  static py::object item(py::handle dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict.ptr(), key);
    if (value == nullptr) {
      if (PyErr_Occurred() == nullptr) PyErr_SetObject(PyExc_KeyError, key);
      throw py::error_already_set();
    }
    return py::reinterpret_borrow<py::object>(value);
  }

  // False where it is missing, or what else it may be.
  static bool flag(py::handle group, PyObject* key, PyObject* other = Py_False) {
    PyObject* const value = PyDict_GetItemWithError(group.ptr(), key);
    if (value == Py_True) return true;
    if (value == Py_False || value == other) return false;
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value != nullptr && read_flag(PyUnicode_AsUTF8(key), value);
  }
};

template <class Rule>
using Stepper =
    StepOf<Rule, std::make_index_sequence<std::tuple_size_v<decltype(Rule::options())>>>;

// ---- the module ---------------------------------------------------------------------------------

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (const cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
  return result;
}

// "sm_90"
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> result;
#if EMOPT_CUDA
  for (const int architecture : cuda::compiled_architectures()) {
    result.push_back("sm_" + std::to_string(architecture / 10));
  }
#endif
  return result;
}

}  // namespace

// Read from the file before it is loaded (_native.py); exported, so that nothing drops it.
extern PYBIND11_EXPORT const char built_for[];
const char built_for[] = "emerging_optimizers is built for torch " TORCH_VERSION;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#define EMOPT_BIND(Rule)                                \
  m.def((std::string(Rule::kName) + "_update").c_str(), \
        torch::wrap_pybind_function(Door<Rule>::update));
  EMOPT_FOR_EACH_RULE(EMOPT_BIND)
#undef EMOPT_BIND
#define EMOPT_BIND(Rule)                              \
  m.def((std::string(Rule::kName) + "_step").c_str(), \
        torch::wrap_pybind_function(Stepper<Rule>::step));
  EMOPT_FOR_EACH_RULE(EMOPT_BIND)
#undef EMOPT_BIND

  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_architectures") = py::cast(cuda_architectures());
  m.def("compiled_isas", [] { return names(cpu::compiled_isas()); });
  m.def("supported_isas", [] { return names(cpu::supported_isas()); });
  m.def("active_isa", [] { return cpu::name(cpu::active_isa()); });
  // The fallback kernels, written in Python, name arguments as the checks here do.
  m.def("is_single_tensor_call", &SingleTensorCall::is_active);
}

}  // namespace emopt
