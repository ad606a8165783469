// From lists of tensors to the engine's table, with the checks of each tensor and of all of them
// together, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../engine/operands.h"
#include "memory_overlap.h"

namespace emopt {

// One tensor argument of an operator: a list, named as its single form is ("grad", "exp_avg").
struct OperandList {
  const char* name;
  at::TensorList tensors;
  bool in_place;
};

// While one lives, messages speak of `exp_avg` where they would otherwise of `exp_avgs[0]`: the
// user passed single tensors, of which the operators see lists of one.
class SingleTensorCall {
 public:
  explicit SingleTensorCall(bool is_single);
  ~SingleTensorCall();
  SingleTensorCall(const SingleTensorCall&) = delete;
  SingleTensorCall& operator=(const SingleTensorCall&) = delete;

  static bool is_active();

 private:
  bool outer_;
};

// "exp_avgs[3]", "out[3]"; in a call on single tensors "exp_avg", "out".
std::string position_name(const char* name, size_t position);
std::string list_name(const char* name);

// A new update: of the layout of its state, and of the dtype that gradient and state promote to.
at::Tensor empty_update(const at::Tensor& grad, const at::Tensor& state);

// A layout and a dtype that can be computed with, or a TypeError.
void check_storage(const char* name, const at::Tensor& tensor, size_t position);

inline bool is_supported_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Of a supported type.
inline DType to_dtype(at::ScalarType type) {
  return type == at::kFloat      ? DType::kFloat32
         : type == at::kBFloat16 ? DType::kBFloat16
         : type == at::kHalf     ? DType::kFloat16
                                 : DType::kFloat64;
}

// "int64", "float8_e4m3fn": as Python spells it, after "torch.".
std::string dtype_text(at::ScalarType type);

using OperandLists = c10::ArrayRef<OperandList>;  // in the order of a row's operands

// Every check of one position by itself.
void check_position(OperandLists lists, size_t position);

// For operators on meta tensors, which end up here also where only some of them are.
void check_all_meta(OperandLists lists, const std::optional<at::Tensor>& step_tensor);

// Whether a position needs none of those, if its tensors are contiguous, too: each is like the
// gradient, on the CPU or a CUDA device, of a known dtype, and nothing more than a tensor.
inline c10::DispatchKeySet plain_keys(c10::DispatchKey key, c10::BackendComponent backend) {
  // These leave out sparse, quantized, nested, meta and inference tensors, and subclasses.
  return c10::DispatchKeySet(key) | c10::getAutogradRelatedKeySetFromBackend(backend) |
         c10::getAutocastRelatedKeySetFromBackend(backend);
}
inline const c10::DispatchKeySet kPlainOnCpu =
    plain_keys(c10::DispatchKey::CPU, c10::BackendComponent::CPUBit);
inline const c10::DispatchKeySet kPlainOnCuda =
    plain_keys(c10::DispatchKey::CUDA, c10::BackendComponent::CUDABit);

inline bool is_plain(const at::Tensor& grad) {
  const c10::DispatchKeySet keys = grad.unsafeGetTensorImpl()->key_set();
  return keys == kPlainOnCpu || keys == kPlainOnCuda;
}

// Not by the comparison of ArrayRefs, which is a call for what is mostly one number.
C10_ALWAYS_INLINE bool has_same_sizes(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const at::IntArrayRef sizes = a.sizes(), others = b.sizes();
  if (sizes.size() != others.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != others[d]) return false;
  }
  return true;
}

// But for its dtype.
C10_ALWAYS_INLINE bool is_beside(const at::Tensor& tensor, const at::Tensor& grad) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const c10::TensorImpl& grad_impl = *grad.unsafeGetTensorImpl();
  const bool is_on_same = impl.key_set() == grad_impl.key_set() &&
                          (impl.key_set() == kPlainOnCpu || impl.device() == grad_impl.device());
  return is_on_same && has_same_sizes(impl, grad_impl);
}
C10_ALWAYS_INLINE bool is_alike(const at::Tensor& tensor, const at::Tensor& grad) {
  return is_beside(tensor, grad) && is_supported_dtype(tensor.scalar_type());
}

// Whether all operands of a position lie in memory in the same order, without gaps.
bool shares_dense_layout(OperandLists lists, size_t position);

// Of one shape.
bool same_strides(const at::Tensor& a, const at::Tensor& b);

bool is_same_view(const at::Tensor& a, const at::Tensor& b);

// Raises where a step that only a device knows is not with the tensors. `step_tensor` may be empty.
void check_step_device(OperandLists lists, const std::optional<at::Tensor>& step_tensor);

// A tensor's memory, of which `address` is where its first element is.
MemoryView memory_of_tensor(const at::Tensor& tensor, const void* address);

// Raises where an operand that is modified shares memory with another one, but for an update that
// is its gradient. `address_of(k, position)` is where an operand is; null where there is nothing.
void refuse_sharing(OperandLists lists,
                    const std::function<const void*(size_t k, size_t position)>& address_of);

// Tensors that stand in for those whose layout an engine cannot sweep beside the others'.
class StandIns {
 public:
  // The tensor to compute with: the user's own where its layout is `layout`'s.
  at::Tensor find(const OperandList& list, size_t position, bool is_read, const at::Tensor& layout);
  void write_back() const;

 private:
  struct StandIn {
    at::Tensor original;
    at::Tensor dense;
    bool in_place;
  };
  std::vector<StandIn> stand_ins_;
};

// Tells autograd what was modified.
void bump_versions(OperandLists lists);

// A table of lists that passed all checks.
template <int kOperands>
class CheckedTable {
 public:
  // `scale_of(position)` is the factor for that position's update.
  template <class ScaleOf>
  CheckedTable(const std::array<OperandList, kOperands>& lists, ScaleOf scale_of) : lists_(lists) {
    const at::TensorList grads = lists_[kGrad].tensors;
    for (const OperandList& list : lists_) {
      TORCH_CHECK_VALUE(list.tensors.size() == grads.size(), list_name(list.name), " has ",
                        list.tensors.size(), " tensors but ", list_name("grad"), " has ",
                        grads.size());
    }
    table_.rows.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      bool needs_no_checks = is_plain(grads[i]);
      for (const OperandList& list : lists_) {
        needs_no_checks &= is_alike(list.tensors[i], grads[i]) &&
                           list.tensors[i].unsafeGetTensorImpl()->is_contiguous();
      }
      if (!needs_no_checks) {
        check_position(lists_, i);
        if (!shares_dense_layout(lists_, i)) strided_.push_back(i);
      }
      table_.append(row(i, scale_of(i)));
    }
    // What is modified gets memory of its own first, where it shared a copy-on-write storage.
    for (const bool in_place : {true, false}) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (lists_[k].in_place == in_place) find_data(k);
      }
    }
    check_aliases();
    for (const size_t i : strided_) use_stand_ins(i);
  }

  const Table<kOperands>& table() const { return table_; }

  // To be called after the sweep.
  void finish() const {
    stand_ins_.write_back();
    bump_versions(lists_);
  }

 private:
  Row<kOperands> row(size_t position, double scale) const {
    const at::Tensor& grad = lists_[kGrad].tensors[position];
    Row<kOperands> row;
    row.device = grad.is_cuda() ? grad.get_device() : kHost;
    row.scale = scale;
    row.numel = grad.numel();
    row.compute = DType::kFloat32;
    for (int k = 0; k < kOperands; ++k) {
      row.dtype[k] = to_dtype(lists_[static_cast<size_t>(k)].tensors[position].scalar_type());
      if (k != kUpdate && row.dtype[k] == DType::kFloat64) row.compute = DType::kFloat64;
    }
    return row;
  }

  void find_data(size_t k) {
    const OperandList& list = lists_[k];
    for (size_t i = 0; i < table_.rows.size(); ++i) {
      Row<kOperands>& row = table_.rows[i];
      const at::Tensor& tensor = list.tensors[i];
      row.data[k] =
          list.in_place ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
      TORCH_CHECK_VALUE(row.data[k] != nullptr || row.numel == 0, position_name(list.name, i),
                        " has no memory: its storage was resized to 0");
      // What the CPU takes, a GPU does not.
      TORCH_CHECK_VALUE(
          row.device == kHost || reinterpret_cast<uintptr_t>(row.data[k]) %
                                         static_cast<uintptr_t>(size_of(row.dtype[k])) ==
                                     0,
          position_name(list.name, i), " does not start at a multiple of its ",
          size_of(row.dtype[k]), "-byte elements");
    }
  }

  // Operands that are modified must share no memory with each other, nor with those that are read.
  void check_aliases() const {
    const auto each_range = [&](auto& visitor) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (k == kGrad) continue;
        visitor.start_list();
        each_row([&](const Row<kOperands>& row) { visitor.modify(range_of(row, k)); });
      }
      each_row([&](const Row<kOperands>& row) {
        if (!is_own_update(row)) visitor.read(range_of(row, kGrad));
      });
    };
    if (are_surely_apart(each_range, table_.rows.size() * kOperands)) return;
    refuse_sharing(lists_, [&](size_t k, size_t i) {
      return table_.rows[i].numel == 0 ? nullptr : table_.rows[i].data[k];
    });
  }

  template <class Visit>
  void each_row(const Visit& visit) const {
    for (const Row<kOperands>& row : table_.rows) {
      if (row.numel != 0) visit(row);
    }
  }

  size_t position_of(const Row<kOperands>& row) const {
    return static_cast<size_t>(&row - table_.rows.data());
  }

  bool is_own_update(const Row<kOperands>& row) const {
    if (row.data[kUpdate] != row.data[kGrad]) return false;
    const size_t i = position_of(row);
    return is_same_view(lists_[kUpdate].tensors[i], lists_[kGrad].tensors[i]);
  }

  EMOPT_FN ByteRange range_of(const Row<kOperands>& row, size_t k) const {
    if (!strided_.empty()) {
      const size_t i = position_of(row);
      if (std::binary_search(strided_.begin(), strided_.end(), i)) {
        return memory_of_tensor(lists_[k].tensors[i], row.data[k]).range;
      }
    }
    return byte_range(row.data[k], row.numel * size_of(row.dtype[k]));
  }

  void use_stand_ins(size_t position) {
    const at::Tensor layout =
        empty_update(lists_[kGrad].tensors[position], lists_[kFirstState].tensors[position]);
    for (int k = 0; k < kOperands; ++k) {
      table_.rows[position].data[k] =
          stand_ins_.find(lists_[static_cast<size_t>(k)], position, k != kUpdate, layout)
              .mutable_data_ptr();
    }
  }

  const std::array<OperandList, kOperands>& lists_;
  Table<kOperands> table_;
  std::vector<size_t> strided_;  // positions that need stand-ins, in order
  StandIns stand_ins_;
};

}  // namespace emopt
