// The step of one parameter group.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/prefetch.h"
#include "candidates.h"
#include "collected_rows.h"
#include "operand_checks.h"
#include "step_overlap.h"
#include "tensor_memory.h"

namespace emopt {

// Tensors are borrowed: counting references would dominate a step, since PyTorch counts some of
// them in Python. That is safe as long as no other thread changes parameters, gradients or states
// during the walk. A sweep without the GIL keeps their storages alive.
template <int kStates_>
class GroupStep {
 public:
  static constexpr int kStates = kStates_;
  using StateNames = typename CandidateWalk<kStates>::StateNames;

  GroupStep(const RuleInstance& rule, GroupOptions options, StepScalars& scalars,
            const StateNames& state_names, py::tuple params, py::tuple grads)
      : rule_(rule),
        options_(std::move(options)),
        scalars_(&scalars),
        walk_(options_, state_names, std::move(params), std::move(grads)),
        rows_(walk_.num_params()) {}

  size_t num_params() const { return walk_.num_params(); }
  bool must_be_native() const { return options_.must_be_native; }
  uint32_t position_of(Py_ssize_t index) const {
    return options_.first_position + static_cast<uint32_t>(index);
  }

  // Collects the parameters that have a gradient. Returns the indices of those that remain, because
  // a state is missing or no engine supports one of the tensors. If the group makes all states, the
  // first call (`is_first`) also returns parameters without a gradient that lack a state.
  std::vector<Py_ssize_t> collect(StateLookup& states, bool is_first) {
    std::vector<Py_ssize_t> remaining;
    walk_.each(states, [&](CandidateOf& c) {
      if (c.grad->defined()) {
        if (!add_row(c)) remaining.push_back(c.index);
      } else if (options_.makes_all_states && !count_idle(c) && is_first) {
        remaining.push_back(c.index);
      }
    });
    return remaining;
  }

  CollectedRows<kStates>& rows() { return rows_; }
  const CollectedRows<kStates>& rows() const { return rows_; }

  // Whether nothing else refers to the collected memory, which then cannot overlap.
  bool owns_memory_alone() const { return others_ == 0; }

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
      for (PyObject* const name : walk_.state_names()) add(Role::kState, find_item(states, name));
      if (walk_.needs_master(THPVariable_Unpack(c.param))) {
        add(Role::kState, find_item(states, master_key));
      }
    }
  }

  // Sorts the rows into waves. Adds parameters that must wait for the fallback to `remaining`.
  void settle(const StepOrder& order, std::vector<Py_ssize_t>& remaining) {
    std::vector<uint32_t> positions;
    rows_.settle(order, positions);
    for (const uint32_t position : positions) {
      remaining.push_back(position - options_.first_position);
    }
    std::sort(remaining.begin(), remaining.end());
  }

  void step(uint32_t wave) { rows_.step(wave, rule_, options_, *scalars_); }

 private:
  using CandidateOf = Candidate<kStates>;
  using RowOf = typename CollectedRows<kStates>::RowOf;
  static constexpr size_t kOperands = CollectedRows<kStates>::kOperands;
  static constexpr size_t kWeight = CollectedRows<kStates>::kWeight;

  // Counts the step for a parameter without a gradient. False if a state is missing.
  bool count_idle(const CandidateOf& c) {
    const auto is_there = [](PyObject* state) { return state != nullptr && state != Py_None; };
    if (c.state == nullptr || c.step_object == nullptr || !is_tensor(c.step_object)) return false;
    if (!std::all_of(c.state_objects.begin(), c.state_objects.end() - 1, is_there)) return false;
    if (c.has_master && !is_there(c.state_objects.back())) return false;
    if (!options_.count) return true;  // the count is on a device
    const at::Tensor& step = THPVariable_Unpack(c.step_object);
    if (!is_plain(step) || step.scalar_type() != at::kFloat || step.numel() != 1) return false;
    if (!step.is_cpu()) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    // If found_inf is on a device, only the device knows whether this step is skipped.
    if (counter == nullptr || scalars_->found_inf.is_on_device()) return counter != nullptr;
    rows_.add_idle(counter);
    rows_.add_modified(step);
    return true;
  }

  // Adds a parameter's row. Adds nothing and returns false if no engine supports it.
  bool add_row(CandidateOf& c) {
    if (!c.is_complete) return false;
    if (c.operands[kUpdate]->is_complex() && !make_real(c)) return false;
    const at::Tensor& param = *c.operands[kUpdate];
    if (!is_plain(param) || !is_supported_dtype(param.scalar_type())) return false;
    if (!param.is_cpu() && !rule_.info->has_cuda_kernels()) return false;
    const bool is_contiguous = param.is_contiguous();
    if (!is_contiguous && !param.is_non_overlapping_and_dense()) return false;
    const auto lies_alike = [&](const at::Tensor& tensor) {
      return is_contiguous ? tensor.is_contiguous() : same_strides(tensor, param);
    };
    uintptr_t others = 0;  // nonzero if anything else may refer to the memory; branch-free
    RowOf row;
    row.device = param.is_cuda() ? param.get_device() : kHost;
    row.position = position_of(c.index);
    if (c.is_distributed && options_.epilogue.is_stochastic) {
      const auto [shard, first_index] = shard_place(c.param);
      row.position |= shard << 32;
      row.first_index = first_index;
    }
    row.scale = 1.0;
    row.numel = param.numel();
    row.compute = DType::kFloat32;
    const bool is_split =
        c.has_master && options_.has_remainders && param.scalar_type() == at::kBFloat16;
    if (rule_.scales_by_shape()) {
      // Use the global shape: for a DTensor, `param` is the local tensor.
      const at::Tensor& global = THPVariable_Unpack(c.param);
      if (global.dim() != 2) return false;  // the fallback raises the error
      row.scale = rule_.info->shape_scale(global.size(0), global.size(1));
    }
    for (size_t k = 0; k < kOperands; ++k) {
      const at::Tensor* operand = c.operands[k];
      if (k == kWeight && !c.has_master) {
        row.dtype[k] = row.dtype[kUpdate];
        row.data[k] = row.data[kUpdate];
      } else {
        const bool is_remainder = is_split && k == kWeight;
        if (is_remainder && operand->scalar_type() != at::kShort) return false;
        const bool is_master = c.has_master && k == kWeight;
        if (is_master && !is_remainder && operand->scalar_type() != at::kFloat) return false;
        // Written out, since a call through a pointer to the check could not be inlined.
        if (k != kUpdate &&
            !(is_remainder ? is_beside(*operand, param) : is_alike(*operand, param))) {
          return false;
        }
        if (k != kUpdate &&
            (!lies_alike(*operand) || (k == kGrad && overlaps_partly(*operand, row)))) {
          if (k != kGrad) return false;
          // Copy the gradient to the parameter's layout.
          add_copied(c);
          owned_.push_back(at::empty_like(param, operand->options()).copy_(*operand));
          operand = c.operands[k] = &owned_.back();
        }
        row.dtype[k] = is_remainder               ? DType::kRemainder
                       : is_split && k == kUpdate ? DType::kSplitParam
                                                  : to_dtype(operand->scalar_type());
        others |= other_owners(*operand, deleter_);
        if (k != kGrad) others |= other_users(*operand);
        row.data[k] = memory_of(*operand, row.dtype[k], k != kGrad);
        prefetch(row.data[k]);
        if (row.data[k] == nullptr && row.numel != 0) return false;
        // The engine treats a weight at the parameter's address as the parameter.
        TORCH_CHECK_VALUE(k != kWeight || row.data[k] != row.data[kUpdate] || row.numel == 0,
                          kSharedState);
        // GPUs fault on misaligned elements.
        if (row.device != kHost && !is_aligned(row.data[k], row.dtype[k])) return false;
      }
      if (is_read(static_cast<int>(k)) && row.dtype[k] == DType::kFloat64) {
        row.compute = DType::kFloat64;
      }
    }
    if (is_split && row.device != kHost && row.compute == DType::kFloat64) return false;
    return append(c, row, others);
  }

  // Whether a gradient in the parameter's layout overlaps it without being the same memory.
  static bool overlaps_partly(const at::Tensor& grad, const RowOf& row) {
    const DType dtype = to_dtype(grad.scalar_type());
    const ByteRange param = CollectedRows<kStates>::range_of(row, kUpdate);
    const ByteRange other = byte_range(memory_of(grad, dtype, false), row.numel * size_of(dtype));
    if (param.begin >= other.end || other.begin >= param.end) return false;
    return param.begin != other.begin || param.end != other.end;
  }

  bool append(const CandidateOf& c, RowOf& row, uintptr_t others) {
    const at::Tensor& step = *c.step;
    const bool is_counter = is_plain(step) && step.scalar_type() == at::kFloat && step.numel() == 1;
    const bool counts_here = step.is_cpu();
    if (options_.count && !counts_here) return false;
    if (!is_counter || !(counts_here || step.get_device() == row.device)) return false;
    // Scalars on a device need a counter there, and cannot be used on the host.
    const bool must_count_there = options_.is_capturable || scalars_->found_inf.is_on_device();
    if (row.device == kHost ? needs_device() : counts_here && must_count_there) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    if (counter == nullptr) return false;
    if (counts_here) {
      const double next =
          options_.count ? *options_.count + 1.0 : static_cast<double>(*counter + 1.0f);
      // A NaN cannot be a key, and infinity is not a count.
      if (!(next >= 1.0 && std::isfinite(next))) return false;
      rows_.add(row, counter, next);
    } else {
      row.step = counter;
      rows_.add(row);
    }
    rows_.add_read(*c.operands[kGrad]);
    rows_.add_modified(step);
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kGrad || (k == kWeight && c.operands[k] == c.operands[kUpdate])) continue;
      rows_.add_modified(*c.operands[k]);
    }
    if (c.is_distributed) {
      rows_.add_modified_dtensor(THPVariable_Unpack(c.param));
      for (PyObject* const object : c.state_objects) {
        if (object != nullptr) rows_.add_modified_dtensor(THPVariable_Unpack(object));
      }
    }
    others_ |= others | c.others | other_owners(step, deleter_) | other_users(step);
    return true;
  }

  void add_copied(const CandidateOf& c) {
    const at::Tensor& grad = *c.operands[kGrad];
    const void* const address = address_of(grad);
    if (address == nullptr) return;
    rows_.add_copied(
        {StepOperand::Role::kGrad, position_of(c.index), memory_of_tensor(grad, address), true});
    others_ |= other_owners(grad, deleter_);
  }

  bool needs_device() const {
    return options_.lr.is_on_device() || scalars_->grad_multiplier.is_on_device() ||
           scalars_->grad_scale.is_on_device() || scalars_->found_inf.is_on_device();
  }

  // Complex tensors are updated as pairs of real numbers.
  bool make_real(CandidateOf& c) {
    const bool is_own_weight = c.operands[kWeight] == c.operands[kUpdate];
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kWeight && is_own_weight) {
        c.operands[k] = c.operands[kUpdate];
        continue;
      }
      const at::Tensor& tensor = *c.operands[k];
      // The memory of a lazily conjugated tensor does not hold its values.
      const bool is_dense = tensor.is_complex() && tensor.layout() == at::kStrided;
      if (!is_dense || (tensor.is_conj() && k != kGrad)) return false;
      if (tensor.is_conj()) add_copied(c);
      owned_.push_back(at::view_as_real(tensor.resolve_conj()));
      c.operands[k] = &owned_.back();
    }
    return true;
  }

  RuleInstance rule_;
  GroupOptions options_;
  StepScalars* scalars_;
  CandidateWalk<kStates> walk_;
  CollectedRows<kStates> rows_;
  std::list<at::Tensor> owned_;  // temporary tensors of this step
  c10::DeleterFnPtr deleter_ = c10::GetCPUAllocator()->raw_deleter();
  uintptr_t others_ = deleter_ == nullptr;  // nonzero if anything else may refer to the memory
};

}  // namespace emopt
