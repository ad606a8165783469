// The step of one parameter group.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "candidates.h"
#include "collected_rows.h"
#include "operand_checks.h"
#include "row_collector.h"
#include "step_overlap.h"

namespace emopt {

// How many walks several threads have shared, for tests.
inline int64_t num_walks_on_threads = 0;

// Tensors are borrowed: counting references would dominate a step, since PyTorch counts some of
// them in Python. That is safe as long as no other thread changes parameters, gradients or states
// during the walk. A sweep without the GIL keeps their storages alive.
template <int kStates_>
class GroupStep {
 public:
  static constexpr int kStates = kStates_;
  using StateNames = typename CandidateWalk<kStates>::StateNames;
  using ScalarNames = typename CandidateWalk<kStates>::ScalarNames;
  using StateCodes = typename CandidateWalk<kStates>::StateCodes;

  GroupStep(const RuleInstance& rule, GroupOptions options, StepScalars& scalars,
            const StateNames& state_names, ScalarNames scalar_names, const StateCodes& codes,
            py::tuple params, py::tuple grads)
      : rule_(rule),
        options_(std::move(options)),
        scalars_(&scalars),
        walk_(options_, state_names, std::move(scalar_names), codes, std::move(params),
              std::move(grads)),
        collected_(walk_.num_params(), num_extras()) {}

  size_t num_params() const { return walk_.num_params(); }
  bool must_be_native() const { return options_.must_be_native; }
  uint32_t position_of(Py_ssize_t index) const {
    return options_.first_position + static_cast<uint32_t>(index);
  }

  // Collects the parameters that have a gradient. Returns the indices of those that remain, because
  // a state is missing or no engine supports one of the tensors. If the group makes all states, the
  // first call (`is_first`) also returns parameters without a gradient that lack a state.
  std::vector<Py_ssize_t> collect(StateLookup& states, bool is_first) {
    if (!collect_on_threads(states, is_first)) {
      RowCollector<kStates> collector(rule_, options_, *scalars_, walk_.codes(), is_first, true,
                                      collected_);
      walk_.each(states, [&](CandidateOf& c) { collector.add(c); });
    }
    return std::move(collected_.remaining);
  }

  CollectedRows<kStates>& rows() { return collected_.rows; }
  const CollectedRows<kStates>& rows() const { return collected_.rows; }

  // Whether nothing else refers to the collected memory, which then cannot overlap.
  bool owns_memory_alone() const { return collected_.others == 0; }

  // Appends the operands of parameters that remain. `state` is the optimizer's. `seen` holds the
  // parameters of earlier groups; this group's are added.
  void append_remaining(std::vector<StepOperand>& operands,
                        const std::vector<Py_ssize_t>& remaining, PyObject* state,
                        std::unordered_set<PyObject*>& seen) const {
    using Role = StepOperand::Role;
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    auto next = remaining.begin();
    for (Py_ssize_t index = 0; index < static_cast<Py_ssize_t>(num_params()); ++index) {
      CandidateOf c;
      c.index = index;
      c.param = walk_.param(index);
      const bool is_first = seen.insert(c.param).second;
      if (next == remaining.end() || *next != index) continue;
      ++next;
      const auto add = [&](Role role, PyObject* object) {
        if (object == nullptr || !is_tensor(object)) return;
        const std::optional<DTensorView> part = DTensorView::from(object);
        const at::Tensor& tensor = THPVariable_Unpack(part ? part->local().ptr() : object);
        const void* const address = address_of(tensor);
        if (address == nullptr) return;
        operands.push_back({role, position_of(index), memory_of_tensor(tensor, address)});
      };
      add(Role::kParam, c.param);
      walk_.find_grad(c);
      add(Role::kGrad, py::reinterpret_steal<py::object>(THPVariable_Wrap(*c.grad)).ptr());
      if (!is_first) continue;  // its states were appended before
      PyObject* const states = find_item(state, c.param);
      if (states == nullptr || !PyDict_Check(states)) continue;
      add(Role::kCounter, find_item(states, step_key));
      for (PyObject* const name : walk_.scalar_names()) {
        add(Role::kCounter, find_item(states, name));
      }
      for (PyObject* const name : walk_.state_names()) add(Role::kState, find_item(states, name));
      for (const StateCoding& code : walk_.codes()) {
        if (code.scale_key != nullptr) add(Role::kState, find_item(states, code.scale_key));
      }
      if (walk_.needs_master(THPVariable_Unpack(c.param))) {
        add(Role::kState, find_item(states, master_key));
      }
    }
  }

  // Sorts the rows into waves. Adds parameters that must wait for the fallback to `remaining`.
  void settle(const StepOrder& order, std::vector<Py_ssize_t>& remaining) {
    std::vector<uint32_t> positions;
    rows().settle(order, positions);
    for (const uint32_t position : positions) {
      remaining.push_back(position - options_.first_position);
    }
    std::sort(remaining.begin(), remaining.end());
  }

  void step(uint32_t wave) { rows().step(wave, rule_, options_, *scalars_); }

 private:
  using CandidateOf = Candidate<kStates>;

  // The scalar states of a parameter, and the scales of its states, at most.
  size_t num_extras() const { return walk_.scalar_names().size() + size_t{kStates}; }

  // The fewest parameters that are worth another thread.
  static constexpr size_t kGrain = 128;

  // Collects all parameters on several threads, or none of them, where that needs Python: this
  // thread keeps the GIL while the others read Python's objects.
  bool collect_on_threads(StateLookup& states, bool is_first) {
    const size_t most = (num_params() + kGrain - 1) / kGrain;
#ifdef Py_GIL_DISABLED
    return false;  // a thread needs a state of Python's to read its objects
#endif
    if (most < 2 || at::in_parallel_region() || !states.is_in_order()) return false;
    const size_t count = std::min(most, static_cast<size_t>(at::get_num_threads()));
    if (count < 2) return false;
    const auto begin_of = [&](size_t part) { return num_params() * part / count; };

    struct Part {
      Collected<kStates> collected;
      StateLookup states;
      bool is_done = false;
    };
    std::vector<std::unique_ptr<Part>> parts(count);
    at::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto index = static_cast<size_t>(i);
        const size_t begin = begin_of(index), end = begin_of(index + 1);
        parts[index].reset(
            new Part{Collected<kStates>(end - begin, num_extras()),
                     states.ahead(walk_.param(static_cast<Py_ssize_t>(begin)), begin)});
        Part& part = *parts[index];
        RowCollector<kStates> collector(rule_, options_, *scalars_, walk_.codes(), is_first, false,
                                        part.collected);
        try {
          part.is_done = walk_.each_without_python(
              begin, end, part.states, [&](CandidateOf& c) { return collector.add(c); });
        } catch (...) {
          part.is_done = false;  // the calling thread raises it
        }
      }
    });
    const StateLookup* last = &states;
    for (const auto& part : parts) {
      if (!part->is_done || !part->states.is_after(*last)) return false;
      if (part->states.has_found()) last = &part->states;
    }
    for (const auto& part : parts) states.follow(part->states);
    ++num_walks_on_threads;
    collected_ = std::move(parts.front()->collected);
    for (size_t i = 1; i < count; ++i) collected_.append(std::move(parts[i]->collected));
    return true;
  }

  RuleInstance rule_;
  GroupOptions options_;
  StepScalars* scalars_;
  CandidateWalk<kStates> walk_;
  Collected<kStates> collected_;
};

}  // namespace emopt
