// Emulated CUDA devices for a PyTorch without CUDA: they use the host's memory, and PyTorch's
// operations run on the CPU on the same memory. The package's CUDA code runs as on a GPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <unordered_map>

namespace {

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>);

// A tensor on another device with the same memory, which it keeps alive.
at::Tensor on_device(const at::Tensor& tensor, c10::Device device) {
  const c10::Storage& storage = tensor.storage();
  auto* const alive = new at::Tensor(tensor);
  c10::DataPtr data(
      storage.mutable_data(), alive, [](void* kept) { delete static_cast<at::Tensor*>(kept); },
      device);
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      c10::GetAllocator(at::kCPU), /*resizable=*/true);
  const auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                      tensor.storage_offset());
  return result;
}

// A call of a PyTorch operation: maps its tensors to the CPU and back.
class CallOnHost {
 public:
  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_host(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(to_host(*tensor)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      // Without an index, this is the current device, which is always 0.
      device_ = c10::Device(at::kCUDA, std::max<c10::DeviceIndex>(value.toDevice().index(), 0));
      return c10::Device(at::kCPU);
    }
    return value;
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_device(tensor));
      return list;
    }
    return value;
  }

 private:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      originals_.emplace(tensor.unsafeGetTensorImpl(), tensor);
      return tensor;
    }
    if (tensor.dim() > 0 || !has_device_) device_ = tensor.device();
    has_device_ = true;
    const at::Tensor host = on_device(tensor, at::kCPU);
    originals_.emplace(host.unsafeGetTensorImpl(), tensor);
    return host;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    const auto found = originals_.find(tensor.unsafeGetTensorImpl());
    if (found == originals_.end()) return on_device(tensor, device_);
    const at::Tensor& original = found->second;
    if (original.is_cuda() && original.sizes() != tensor.sizes()) {  // an `out` that was resized
      const at::Tensor resized = on_device(tensor, original.device());
      original.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
      original.unsafeGetTensorImpl()->set_sizes_and_strides(resized.sizes(), resized.strides());
    }
    return original;
  }

  c10::Device device_{at::kCUDA, 0};
  bool has_device_ = false;
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals_;
};

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  CallOnHost call;
  const size_t num_arguments = op.schema().arguments().size();
  const size_t begin = stack->size() - num_arguments;
  for (size_t i = begin; i < stack->size(); ++i) (*stack)[i] = call.to_host((*stack)[i]);
  op.callBoxed(*stack);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = call.to_device((*stack)[i]);
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // PyTorch's copy_ kernel is for all devices and would look for device code.
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  // Views share their base's storage.
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
}

}  // namespace
