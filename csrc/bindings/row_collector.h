// Makes rows of the parameters that a step has found.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/COWDeleter.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <utility>
#include <vector>

#include "../engine/codes.h"
#include "../engine/prefetch.h"
#include "candidates.h"
#include "collected_rows.h"
#include "operand_checks.h"
#include "runtime_kernels.h"
#include "step_overlap.h"
#include "tensor_memory.h"

namespace emopt {

// What a step has collected from one group.
template <int kStates>
struct Collected {
  CollectedRows<kStates> rows;
  // The indices of parameters that remain, because a state is missing or no engine supports one of
  // the tensors.
  std::vector<Py_ssize_t> remaining;
  std::list<at::Tensor> owned;  // temporary tensors of the step
  uintptr_t others = 0;         // nonzero if anything else may refer to the memory

  Collected(size_t num_params, size_t num_scalars) : rows(num_params, num_scalars) {}

  // Adds what was collected from later parameters.
  void append(Collected&& later) {
    rows.append(std::move(later.rows));
    remaining.insert(remaining.end(), later.remaining.begin(), later.remaining.end());
    owned.splice(owned.end(), later.owned);
    others |= later.others;
  }
};

// Borrows what it is made from.
template <int kStates>
class RowCollector {
 public:
  using CandidateOf = Candidate<kStates>;
  using StateCodes = typename CandidateWalk<kStates>::StateCodes;

  // `adds_idle` makes parameters without a gradient that lack a state remain, if the group makes
  // all states. If not `with_python`, any thread may add parameters while another one holds the
  // GIL.
  RowCollector(const RuleInstance& rule, const GroupOptions& options, const StepScalars& scalars,
               const StateCodes& codes, bool adds_idle, bool with_python,
               Collected<kStates>& collected)
      : rule_(rule),
        options_(options),
        scalars_(scalars),
        codes_(codes),
        adds_idle_(adds_idle),
        with_python_(with_python),
        deleter_(c10::GetCPUAllocator()->raw_deleter()),
        num_scalars_(rule.info->num_scalar_states),
        collected_(collected) {
    collected_.others |= deleter_ == nullptr;
  }

  // Adds a parameter. False if that may call Python, but must not.
  bool add(CandidateOf& c) {
    bool is_done = true;
    if (c.grad->defined()) {
      is_done = add_row(c);
    } else if (options_.makes_all_states) {
      is_done = count_idle(c) || !adds_idle_;
    }
    if (!is_done) collected_.remaining.push_back(c.index);
    return !needs_python_;
  }

 private:
  using RowOf = typename CollectedRows<kStates>::RowOf;
  static constexpr size_t kOperands = CollectedRows<kStates>::kOperands;
  static constexpr size_t kWeight = CollectedRows<kStates>::kWeight;
  static bool is_state(size_t k) { return k >= kFirstState && k < kWeight; }

  uint32_t position_of(const CandidateOf& c) const {
    return options_.first_position + static_cast<uint32_t>(c.index);
  }

  // Counts the step for a parameter without a gradient. False if a state is missing.
  bool count_idle(const CandidateOf& c) {
    const auto is_there = [](PyObject* state) { return state != nullptr && state != Py_None; };
    if (c.state == nullptr || c.step_object == nullptr || !is_tensor(c.step_object)) return false;
    if (!std::all_of(c.state_objects.begin(), c.state_objects.end() - 1, is_there)) return false;
    const auto* const scalars = c.scalars->objects.data();
    if (!std::all_of(scalars, scalars + num_scalars_, is_there)) return false;
    if (c.has_master && !is_there(c.state_objects.back())) return false;
    if (!options_.count) return true;  // the count is on a device
    const at::Tensor& step = THPVariable_Unpack(c.step_object);
    if (!is_plain(step) || step.scalar_type() != at::kFloat || step.numel() != 1) return false;
    if (!step.is_cpu()) return false;
    if (is_copy_on_write(step) && !may_allocate()) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    // If found_inf is on a device, only the device knows whether this step is skipped.
    if (counter == nullptr || scalars_.found_inf.is_on_device()) return counter != nullptr;
    collected_.rows.add_idle(counter);
    collected_.rows.add_modified(step);
    return true;
  }

  // Adds a parameter's row. Adds nothing and returns false if no engine supports it.
  bool add_row(CandidateOf& c) {
    if (!c.is_complete) return false;
    if (c.operands[kUpdate]->is_complex()) {
      if (!may_allocate() || !make_real(c)) return false;
    }
    const at::Tensor& param = *c.operands[kUpdate];
    if (!is_plain(param) || !is_supported_dtype(param.scalar_type())) return false;
    if (!param.is_cpu() && !rule_.info->has_cuda_kernels()) return false;
    const bool is_contiguous = param.is_contiguous();
    if (!is_contiguous && !param.is_non_overlapping_and_dense()) return false;
    const auto lies_alike = [&](const at::Tensor& tensor) {
      return is_contiguous ? tensor.is_contiguous() : same_strides(tensor, param);
    };
    uintptr_t others = 0;  // nonzero if anything else may refer to the memory; branch-free
    scales_.clear();
    RowOf row;
    row.device = param.is_cuda() ? param.get_device() : kHost;
    row.position = position_of(c);
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
        const bool is_coded = is_state(k) && operand->scalar_type() == at::kByte;
        // Written out, since a call through a pointer to the check could not be inlined.
        if (k != kUpdate &&
            !(is_remainder || is_coded ? is_beside(*operand, param) : is_alike(*operand, param))) {
          return false;
        }
        if (k != kUpdate &&
            (!lies_alike(*operand) || (k == kGrad && overlaps_partly(*operand, row)))) {
          if (k != kGrad || !may_allocate()) return false;
          // Copy the gradient to the parameter's layout.
          add_copied(c);
          collected_.owned.push_back(at::empty_like(param, operand->options()).copy_(*operand));
          operand = c.operands[k] = &collected_.owned.back();
        }
        if (is_coded && !add_scales(c, k - kFirstState, row, others)) return false;
        row.dtype[k] = is_coded                   ? codes_[k - kFirstState].dtype
                       : is_remainder             ? DType::kRemainder
                       : is_split && k == kUpdate ? DType::kSplitParam
                                                  : to_dtype(operand->scalar_type());
        if (is_copy_on_write(*operand) && !may_allocate()) return false;
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
    const bool needs_float32 = is_split || !scales_.empty();
    if (needs_float32 && row.device != kHost && row.compute == DType::kFloat64) return false;
    if (row.extras != nullptr) {
      row.extras->place = {row.position, 0, 0, 0};
      if (c.is_distributed) {
        const auto [shard, first_index, width, stride] = state_place(c.param);
        row.extras->place = {row.position | shard << 32, first_index, width, stride};
      }
    }
    if (c.is_distributed && options_.epilogue.is_stochastic) {
      const auto [shard, first_index] = shard_place(c.param);
      row.position |= shard << 32;
      row.first_index = first_index;
    }
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
    const bool counts_here = step.is_cpu();
    if (options_.count && !counts_here) return false;
    const int8_t counts_on = counts_here ? kHost : row.device;
    float* const counter = number_on(counts_on, step);
    if (counter == nullptr) return false;
    // Scalars on a device need a counter there, and cannot be used on the host.
    const bool must_count_there = options_.is_capturable || scalars_.found_inf.is_on_device();
    if (row.device == kHost ? needs_device() : counts_here && must_count_there) return false;
    if (!add_scalars(c, row, counts_on)) return false;
    if (row.device != kHost && !has_kernel_for(row, !counts_here)) return false;
    if (counts_here) {
      const double next =
          options_.count ? *options_.count + 1.0 : static_cast<double>(*counter + 1.0f);
      // A NaN cannot be a key, and infinity is not a count.
      if (!(next >= 1.0 && std::isfinite(next))) return false;
      collected_.rows.add(row, counter, next);
    } else {
      row.step = counter;
      collected_.rows.add(row);
    }
    collected_.rows.add_read(*c.operands[kGrad]);
    collected_.rows.add_modified(step);
    for (size_t i = 0; i < num_scalars_; ++i) {
      collected_.rows.add_modified(*c.scalars->tensors[i]);
      others |=
          other_owners(*c.scalars->tensors[i], deleter_) | other_users(*c.scalars->tensors[i]);
    }
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kGrad || (k == kWeight && c.operands[k] == c.operands[kUpdate])) continue;
      collected_.rows.add_modified(*c.operands[k]);
    }
    for (const auto& [scales, object] : scales_) {
      collected_.rows.add_modified(*scales);
      if (c.is_distributed) collected_.rows.add_modified_dtensor(THPVariable_Unpack(object));
    }
    if (c.is_distributed) {
      collected_.rows.add_modified_dtensor(THPVariable_Unpack(c.param));
      for (PyObject* const object : c.state_objects) {
        if (object != nullptr) collected_.rows.add_modified_dtensor(THPVariable_Unpack(object));
      }
    }
    collected_.others |= others | c.others | other_owners(step, deleter_) | other_users(step);
    return true;
  }

  // The memory of a counter or a scalar state; null if it is on another device, or cannot be
  // advanced natively.
  float* number_on(int8_t device, const at::Tensor& tensor) {
    if (!is_plain(tensor) || tensor.scalar_type() != at::kFloat || tensor.numel() != 1) {
      return nullptr;
    }
    if (device == kHost ? !tensor.is_cpu() : tensor.get_device() != device) return nullptr;
    if (is_copy_on_write(tensor) && !may_allocate()) return nullptr;
    return static_cast<float*>(memory_of(tensor, DType::kFloat32, true));
  }

  // Adds the scalar states to a row, if all are where its steps are counted.
  bool add_scalars(const CandidateOf& c, RowOf& row, int8_t device) {
    if (num_scalars_ == 0) return true;
    RowExtras& extras = extras_of(row);
    for (size_t i = 0; i < num_scalars_; ++i) {
      extras.scalars[i] = number_on(device, *c.scalars->tensors[i]);
      if (extras.scalars[i] == nullptr) return false;
    }
    return true;
  }

  // Adds the scales of a state that is stored as codes.
  bool add_scales(const CandidateOf& c, size_t state, RowOf& row, uintptr_t& others) {
    const StateCoding& code = codes_[state];
    if (code.scale_key == nullptr || !may_allocate()) return false;
    PyObject* const object = find_item(c.state, code.scale_key);
    if (object == nullptr || !is_tensor(object)) return false;
    const at::Tensor* scales = &THPVariable_Unpack(object);
    if (c.is_distributed) {
      std::optional<DTensorView> part = DTensorView::from(object),
                                 param = DTensorView::from(c.param);
      if (!part || !param || !part->is_placed_as(*param)) return false;
      collected_.owned.push_back(THPVariable_Unpack(part->local().ptr()));
      scales = &collected_.owned.back();
    }
    const at::Tensor& codes = *c.operands[kFirstState + state];
    if (!is_plain(*scales) || scales->scalar_type() != at::kByte ||
        scales->device() != codes.device() || !are_scales_of(*scales, codes)) {
      return false;
    }
    void* const memory = memory_of(*scales, code.dtype, true);
    if (memory == nullptr && row.numel != 0) return false;
    extras_of(row).scales[state] = static_cast<uint8_t*>(memory);
    others |= Py_REFCNT(object) != 1;
    others |= other_owners(*scales, deleter_) | other_users(*scales);
    scales_.emplace_back(scales, object);
    return true;
  }

  // Whether groups are consecutive in memory, in the order of their scales.
  static bool are_scales_of(const at::Tensor& scales, const at::Tensor& codes) {
    const int64_t dims = codes.dim();
    if (!codes.is_contiguous() || !scales.is_contiguous() || scales.dim() != dims || dims == 0) {
      return false;
    }
    for (int64_t d = 0; d + 1 < dims; ++d) {
      if (scales.size(d) != codes.size(d)) return false;
    }
    return (dims == 1 || codes.size(dims - 1) % kGroup == 0) &&
           scales.size(dims - 1) == num_groups(codes.size(dims - 1));
  }

  RowExtras& extras_of(RowOf& row) {
    if (row.extras == nullptr) row.extras = collected_.rows.new_extras();
    return *row.extras;
  }

  bool has_kernel_for(const RowOf& row, bool counts_on_device) const {
    const bool is_stochastic =
        options_.epilogue.is_stochastic && can_round_stochastically(row.dtype[kUpdate]);
    // Ask for both, so that both are built if they are missing.
    const bool can_advance = !counts_on_device || has_advance_kernel(*rule_.info, row.device);
    const bool can_sweep =
        scales_.empty()
            ? has_kernel<ApplyUpdate>(*rule_.info, row.device, row.compute == DType::kFloat64,
                                      counts_on_device || needs_device() || is_stochastic)
            : has_kernel_for_codes(*rule_.info, row.device);
    return can_advance && can_sweep;
  }

  bool may_allocate() {
    needs_python_ |= !with_python_;
    return with_python_;
  }

  void add_copied(const CandidateOf& c) {
    const at::Tensor& grad = *c.operands[kGrad];
    const void* const address = address_of(grad);
    if (address == nullptr) return;
    collected_.rows.add_copied(
        {StepOperand::Role::kGrad, position_of(c), memory_of_tensor(grad, address), true});
    collected_.others |= other_owners(grad, deleter_);
  }

  bool needs_device() const {
    return options_.lr.is_on_device() || scalars_.grad_multiplier.is_on_device() ||
           scalars_.grad_scale.is_on_device() || scalars_.found_inf.is_on_device();
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
      collected_.owned.push_back(at::view_as_real(tensor.resolve_conj()));
      c.operands[k] = &collected_.owned.back();
    }
    return true;
  }

  const RuleInstance& rule_;
  const GroupOptions& options_;
  const StepScalars& scalars_;
  const StateCodes& codes_;
  // The scales of the row that is being added: this process's part, and the state.
  c10::SmallVector<std::pair<const at::Tensor*, PyObject*>, kMaxStates> scales_;
  bool adds_idle_, with_python_;
  bool needs_python_ = false;
  c10::DeleterFnPtr deleter_;
  size_t num_scalars_;
  Collected<kStates>& collected_;
};

}  // namespace emopt
