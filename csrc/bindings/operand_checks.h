// From lists of tensors to the engine's table, with the checks of each tensor and of all of them
// together, before anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

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

// Whose layout the others follow: the first state, or the gradient where a rule has none.
inline const OperandList& layout_list(OperandLists lists) {
  return lists[lists.size() > kFirstState ? kFirstState : kGrad];
}

// Every check of one position by itself.
void check_position(OperandLists lists, size_t position);

// For operators on meta tensors, which end up here also where only some of them are.
void check_all_meta(OperandLists lists, const std::optional<at::Tensor>& step_tensor);

// ---- plain tensors ------------------------------------------------------------------------------

// A plain tensor is dense, on the CPU or a CUDA device, and nothing but a tensor. A position whose
// tensors are plain, contiguous and alike needs none of the checks above.
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

// On one device and of one shape.
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

inline bool is_aligned(const void* address, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

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

// Dense copies of tensors whose layout an engine cannot sweep beside the others'.
class DenseCopies {
 public:
  // The tensor to compute with: a copy, unless it has the layout already.
  at::Tensor find(const OperandList& list, size_t position, bool is_read, const at::Tensor& layout);
  void write_back() const;

 private:
  struct DenseCopy {
    at::Tensor original;
    at::Tensor dense;
    bool in_place;
  };
  std::vector<DenseCopy> dense_copies_;
};

// Tells autograd what was modified.
void bump_versions(OperandLists lists);

}  // namespace emopt
