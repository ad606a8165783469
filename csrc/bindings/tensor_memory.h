// The memory of tensors, and whether anything else refers to it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/COWDeleter.h>

#include <cstddef>
#include <cstdint>

#include "../engine/dtypes.h"

namespace emopt {

// The first element of a plain tensor; null if it has no memory.
C10_ALWAYS_INLINE void* memory_of(const at::Tensor& tensor, DType dtype, bool is_modified) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
  // mutable_data() materializes a copy-on-write storage.
  void* const base = is_modified ? storage.mutable_data() : const_cast<void*>(storage.data());
  if (base == nullptr) return nullptr;
  return static_cast<char*>(base) + impl.storage_offset() * size_of(dtype);
}

// The first element of any tensor; null if it has no memory that can be read.
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

// Zero if nothing else refers to a plain tensor's memory: no other tensor uses its storage, which
// came from the allocator with this deleter.
C10_ALWAYS_INLINE uintptr_t other_owners(const at::Tensor& tensor, c10::DeleterFnPtr deleter) {
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  const c10::DataPtr& memory = storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  const auto differ = [](c10::DeleterFnPtr a, c10::DeleterFnPtr b) {
    return reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b);
  };
  return differ(memory.get_deleter(), deleter) | (storage.use_count() ^ 1);
}

// Whether accessing a plain tensor's memory to modify it may copy that.
inline bool is_copy_on_write(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  return storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get_deleter() ==
         c10::impl::cow::cow_deleter;
}

// Zero if a tensor's only reference is its Python object.
C10_ALWAYS_INLINE uintptr_t other_users(const at::Tensor& tensor) {
  return c10::raw::intrusive_ptr::use_count(tensor.unsafeGetTensorImpl()) ^ 1;
}

// Whether to release the GIL for work on elements, which means to hold every storage: that takes as
// long as sweeping some hundred elements of each. Other threads may wait for work on fewer.
inline bool is_worth_the_gil(int64_t numel, size_t num_storages) {
  constexpr int64_t kFew = 1 << 18, kMany = 1 << 23;
  return numel >= kMany || (numel >= kFew && numel >= 1024 * static_cast<int64_t>(num_storages));
}

}  // namespace emopt
