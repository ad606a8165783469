// Where plain tensors lie in memory, and who else refers to it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <cstdint>

#include "../engine/dtypes.h"

namespace emopt {

// Where the elements of a plain tensor are; null where it has no memory.
C10_ALWAYS_INLINE void* memory_of(const at::Tensor& tensor, DType dtype, bool is_modified) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
  // Of its own, where it shared a copy-on-write storage.
  void* const base = is_modified ? storage.mutable_data() : const_cast<void*>(storage.data());
  if (base == nullptr) return nullptr;
  return static_cast<char*>(base) + impl.storage_offset() * size_of(dtype);
}

// Where any tensor's elements are; null where it has no memory that could be looked at.
inline const void* address_of(const at::Tensor& tensor) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (impl.layout() != at::kStrided || impl.key_set().has(c10::DispatchKey::Python) ||
      tensor.numel() == 0 || !impl.has_storage()) {
    return nullptr;
  }
  const void* const base = impl.unsafe_storage().unsafeGetStorageImpl()->data();
  if (base == nullptr) return nullptr;
  return static_cast<const char*>(base) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
}

// Of a plain tensor, zero where it alone refers to its storage, and where that came from the
// allocator with this deleter, so that nothing else refers to the memory.
C10_ALWAYS_INLINE uintptr_t other_owners(const at::Tensor& tensor, c10::DeleterFnPtr deleter) {
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  const c10::DataPtr& memory = storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  const auto differ = [](c10::DeleterFnPtr a, c10::DeleterFnPtr b) {
    return reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b);
  };
  return differ(memory.get_deleter(), deleter) | (storage.use_count() ^ 1);
}

// Zero where a tensor has one reference, as that of its Python object.
C10_ALWAYS_INLINE uintptr_t other_users(const at::Tensor& tensor) {
  return c10::raw::intrusive_ptr::use_count(tensor.unsafeGetTensorImpl()) ^ 1;
}

}  // namespace emopt
