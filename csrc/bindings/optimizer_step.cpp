#include "optimizer_step.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include "group_step.h"
#include "tensor_memory.h"
#include "tracing_modes.h"

namespace emopt {

namespace {

// The groups of one step may have different rules.
using AnyGroupStep = std::variant<GroupStep<0>, GroupStep<1>, GroupStep<2>, GroupStep<3>,
                                  GroupStep<4>, GroupStep<5>>;
using Steps = std::vector<AnyGroupStep>;
using Remaining = std::vector<std::vector<Py_ssize_t>>;  // by group

template <class Any, class Visit>
decltype(auto) with(Any& step, const Visit& visit) {
  return std::visit(visit, step);
}

// A copy: another thread may change the list.
py::tuple params_of(py::handle group) {
  static PyObject* const key = interned("params");
  auto params = py::reinterpret_steal<py::tuple>(PySequence_Tuple(group_item(group, key).ptr()));
  if (!params) throw py::error_already_set();
  return params;
}

// Empty if no gradients were given.
py::tuple grads_of(py::handle grads, size_t group) {
  return grads.is_none() ? py::tuple() : py::tuple(grads[py::int_(group)]);
}

Remaining all_params(const py::list& groups) {
  Remaining indices;
  for (const py::handle group : groups) {
    indices.emplace_back(params_of(group).size());
    std::iota(indices.back().begin(), indices.back().end(), Py_ssize_t{0});
  }
  return indices;
}

// Of None, or of a pair: the key of the scales, and whether the codes have a sign.
StateCoding read_code(py::handle item) {
  if (item.is_none()) return {DType::kFloat32, nullptr};
  const auto pair = py::reinterpret_borrow<py::tuple>(item);
  TORCH_CHECK_VALUE(pair.size() == 2, "a code has ", pair.size(), " items; expected 2");
  return {pair[1].ptr() == Py_True ? DType::kE4M3 : DType::kUE5M3, pair[0].ptr()};
}

StateCode kind_of(const StateCoding& code) {
  if (code.scale_key == nullptr) return StateCode::kNone;
  return code.dtype == DType::kE4M3 ? StateCode::kSigned : StateCode::kUnsigned;
}

void add_step(Steps& steps, py::handle group, const py::tuple& rule, uint32_t first_position,
              uint64_t seed, StepScalars& scalars, py::tuple grads) {
  const auto* registered =
      static_cast<const RegisteredRule*>(PyCapsule_GetPointer(rule[0].ptr(), nullptr));
  if (registered == nullptr) throw py::error_already_set();
  const RuleInfo& info = *registered->info;
  const py::tuple state_names = rule[2];
  TORCH_CHECK_VALUE(state_names.size() == info.num_states, "state_names has ", state_names.size(),
                    " names; expected ", info.num_states);
  const py::tuple scalar_names = rule[3];
  TORCH_CHECK_VALUE(scalar_names.size() == info.num_scalar_states, "scalar_names has ",
                    scalar_names.size(), " names; expected ", info.num_scalar_states);
  const py::tuple codes = rule[4];
  TORCH_CHECK_VALUE(codes.size() == info.num_states, "codes has ", codes.size(),
                    " items; expected ", info.num_states);
  with_num_states(info.num_states, [&](auto num_states) {
    using Step = GroupStep<num_states>;
    typename Step::StateNames names{};
    typename Step::StateCodes state_codes{};
    for (size_t i = 0; i < names.size(); ++i) {
      names[i] = state_names[i].ptr();
      state_codes[i] = read_code(codes[i]);
      TORCH_INTERNAL_ASSERT(
          info.state_codes == nullptr || kind_of(state_codes[i]) == info.state_codes[i], info.name,
          " declares other codes");
    }
    typename Step::ScalarNames scalar_keys;
    for (const py::handle name : scalar_names) scalar_keys.push_back(name.ptr());
    steps.emplace_back(std::in_place_type<Step>, read_rule(info, group, rule[1]),
                       read_options(group, first_position, seed), scalars, names,
                       std::move(scalar_keys), state_codes, params_of(group), std::move(grads));
  });
}

bool is_any(const Remaining& remaining) {
  return std::any_of(remaining.begin(), remaining.end(),
                     [](const auto& group) { return !group.empty(); });
}

bool may_run(const Steps& steps, const Remaining& remaining, bool may_leave) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool must_be_native =
        with(steps[i], [](const auto& step) { return step.must_be_native(); });
    if (!remaining[i].empty() && (!may_leave || must_be_native)) return false;
  }
  return true;
}

// Orders the parameters that share memory. Adds those that must wait for the fallback to
// `remaining`. Returns the number of waves.
uint32_t settle(Steps& steps, Remaining& remaining, const py::dict& state) {
  const auto owns_alone = [](const AnyGroupStep& any) {
    return with(any, [](const auto& step) { return step.owns_memory_alone(); });
  };
  if (!is_any(remaining) && std::all_of(steps.begin(), steps.end(), owns_alone)) return 1;
  std::vector<StepOperand> operands;
  std::unordered_set<PyObject*> seen;
  for (size_t i = 0; i < steps.size() && is_any(remaining); ++i) {
    with(steps[i], [&](const auto& step) {
      step.append_remaining(operands, remaining[i], state.ptr(), seen);
    });
  }
  const auto each_range = [&](auto& visitor) {
    for (const AnyGroupStep& any : steps) {
      with(any, [&](const auto& step) { step.rows().each_modified(visitor); });
    }
    visitor.start_list();
    for (const StepOperand& other : operands) {
      if (other.is_modified()) visitor.modify(other.view.range);
    }
    for (const AnyGroupStep& any : steps) {
      with(any, [&](const auto& step) { step.rows().each_read(visitor); });
    }
    for (const StepOperand& other : operands) {
      if (!other.is_modified()) visitor.read(other.view.range);
    }
  };
  size_t count = operands.size();
  for (const AnyGroupStep& any : steps) {
    count += with(any, [](const auto& step) { return step.rows().max_ranges(); });
  }
  if (are_surely_apart(each_range, count)) return 1;
  std::vector<char> is_remaining;
  for (size_t i = 0; i < steps.size(); ++i) {
    with(steps[i], [&](const auto& step) {
      step.rows().append_operands(operands);
      const size_t end = step.position_of(static_cast<Py_ssize_t>(step.num_params()));
      is_remaining.resize(std::max(is_remaining.size(), end));
      for (const Py_ssize_t index : remaining[i]) is_remaining[step.position_of(index)] = true;
    });
  }
  const StepOrder order(std::move(operands), std::move(is_remaining));
  for (size_t i = 0; i < steps.size(); ++i) {
    with(steps[i], [&](auto& step) { step.settle(order, remaining[i]); });
  }
  return order.num_waves();
}

void run(Steps& steps, uint32_t num_waves) {
  int64_t numel = 0;
  size_t num_storages = 0;
  bool any_on_device = false;
  for (AnyGroupStep& any : steps) {
    with(any, [&](auto& step) {
      step.rows().bump_versions();
      numel += step.rows().numel();
      num_storages += step.rows().num_storages();
      any_on_device |= step.rows().any_on_device();
    });
  }
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages;
  std::optional<py::gil_scoped_release> without_gil;
  if (any_on_device || is_worth_the_gil(numel, num_storages)) {
    storages.reserve(num_storages);
    for (const AnyGroupStep& any : steps) {
      with(any, [&](const auto& step) { step.rows().append_storages(storages); });
    }
    without_gil.emplace();
  }
  for (uint32_t wave = 0; wave < num_waves; ++wave) {
    for (AnyGroupStep& any : steps) {
      with(any, [&](auto& step) { step.step(wave); });
    }
  }
}

}  // namespace

int64_t count_walks_on_threads() { return num_walks_on_threads; }

py::object optimizer_step(const py::dict& state, const py::list& groups, const py::list& positions,
                          const py::list& rules, const py::tuple& arguments, py::handle grads,
                          bool may_leave) {
  const at::NoGradGuard no_grad;  // cheaper here than in Python
  if (torch::jit::tracer::isTracing()) refuse_trace("an optimizer's step");
  if (is_seen_by_tracer()) return py::cast(all_params(groups));
  StepScalars scalars{{"grad_multiplier", py::object(arguments[0]), 1.0},
                      {"grad_scale", py::object(arguments[1]), 1.0},
                      {"found_inf", py::object(arguments[2]), 0.0}};
  const auto seed = arguments[3].cast<uint64_t>();

  // Read all options first: this may run Python code or raise, and nothing may change during the
  // walk.
  const size_t num_groups = groups.size();
  Steps steps;
  steps.reserve(num_groups);
  for (size_t i = 0; i < num_groups; ++i) {
    add_step(steps, groups[i], rules[i], positions[i].cast<uint32_t>(), seed, scalars,
             grads_of(grads, i));
  }

  StateLookup states(state.ptr());
  Remaining remaining(num_groups);
  for (size_t i = 0; i < num_groups; ++i) {
    with(steps[i], [&](auto& step) { remaining[i] = step.collect(states, !may_leave); });
  }
  uint32_t num_waves = 1;
  if (may_run(steps, remaining, may_leave)) num_waves = settle(steps, remaining, state);
  if (may_run(steps, remaining, may_leave)) run(steps, num_waves);
  if (!is_any(remaining)) return py::none();
  return py::cast(remaining);
}

}  // namespace emopt
