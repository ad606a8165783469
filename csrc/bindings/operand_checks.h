// The checks of an operator's tensors, each by itself and all together, before anything is
// written.
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

// One tensor argument of an operator: a list with its singular name ("grad", "exp_avg").
struct OperandList {
  const char* name;
  at::TensorList tensors;
  bool in_place;
};

// While an object of this class exists, messages say `exp_avg` instead of `exp_avgs[0]`: the user
// passed single tensors, which the operators see as lists of one.
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

// A new update, in the layout of its state and the dtype that gradient and state promote to.
at::Tensor empty_update(const at::Tensor& grad, const at::Tensor& state);

// Raises a TypeError for a layout or a dtype that is not supported.
void check_storage(const char* name, const at::Tensor& tensor, size_t position);

inline bool is_supported_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// `type` must be supported.
inline DType to_dtype(at::ScalarType type) {
  return type == at::kFloat      ? DType::kFloat32
         : type == at::kBFloat16 ? DType::kBFloat16
         : type == at::kHalf     ? DType::kFloat16
                                 : DType::kFloat64;
}

// "int64", "float8_e4m3fn": the name in Python, without "torch.".
std::string dtype_text(at::ScalarType type);

using OperandLists = c10::ArrayRef<OperandList>;  // in the order of a row's operands

// The list whose layout the others follow: the first state, or the gradient of a stateless rule.
inline const OperandList& layout_list(OperandLists lists) {
  return lists[lists.size() > kFirstState ? kFirstState : kGrad];
}

// Checks the tensors of one position, regardless of the others.
void check_position(OperandLists lists, size_t position);

// The step or a scalar state.
struct NumberTensor {
  const char* name;
  at::Tensor tensor;
};
using NumberTensors = c10::ArrayRef<NumberTensor>;

// The dispatcher calls the meta kernel if any tensor is meta; raises unless all operands are.
void check_all_meta(OperandLists lists, NumberTensors numbers);

// ---- plain tensors ------------------------------------------------------------------------------

// A plain tensor is dense, on the CPU or a CUDA device, and of no subclass. A position whose
// tensors are plain, contiguous and of one shape and device needs none of the checks above.
inline c10::DispatchKeySet plain_keys(c10::DispatchKey key, c10::BackendComponent backend) {
  // This excludes sparse, quantized, nested, meta and inference tensors, and subclasses.
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

// Comparing ArrayRefs would be a function call, mostly for a single number.
C10_ALWAYS_INLINE bool has_same_sizes(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const at::IntArrayRef sizes = a.sizes(), others = b.sizes();
  if (sizes.size() != others.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != others[d]) return false;
  }
  return true;
}

// Whether both are on the same device and of the same shape.
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

// `a` and `b` must have the same shape.
bool same_strides(const at::Tensor& a, const at::Tensor& b);

bool is_same_view(const at::Tensor& a, const at::Tensor& b);

// Raises if a number is on a device and the operands are not on the same one.
void check_number_devices(OperandLists lists, NumberTensors numbers);

// The memory of a tensor whose first element is at `address`.
MemoryView memory_of_tensor(const at::Tensor& tensor, const void* address);

// Raises if a modified operand shares memory with another one, except for an update that is its
// gradient. `address_of(k, position)` is an operand's address; null if it is empty.
void refuse_sharing(OperandLists lists,
                    const std::function<const void*(size_t k, size_t position)>& address_of);

// Dense copies of tensors whose layout differs from that of the other operands.
class DenseCopies {
 public:
  // Returns a copy in the layout, or the tensor itself if it already has it.
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

// Autograd detects in-place modifications by these counters.
void bump_versions(OperandLists lists);

}  // namespace emopt
