#include "norm_sum.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "../engine/cpu/norm.h"
#include "../engine/cpu/norm_sweep.h"
#include "../engine/prefetch.h"
#include "operand_checks.h"
#include "python_arguments.h"
#include "python_objects.h"
#include "tensor_memory.h"
#include "tracing_modes.h"
#if EMOPT_CUDA
#include "../engine/cuda/device_norm.h"
#endif

namespace emopt {

namespace {

#if EMOPT_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

NormOrder read_order(double order) {
  if (order == 1.0) return NormOrder::kOne;
  if (order == 2.0) return NormOrder::kTwo;
  TORCH_CHECK_VALUE(order == std::numeric_limits<double>::infinity(), "order is ", order,
                    "; expected 1, 2 or inf");
  return NormOrder::kInf;
}

// A copy: another thread may change the list.
py::tuple items(const char* name, py::handle value) {
  auto result = py::reinterpret_steal<py::tuple>(items_of(value.ptr()));
  TORCH_CHECK_TYPE(result, name, " must be a sequence of Tensors, not ", type_name(value.ptr()));
  return result;
}

// The real numbers of a gradient's elements.
struct Numbers {
  DType dtype;
  int64_t per_element;  // 0 if the gradient is not supported
};

// A complex number's square is the sum of two.
Numbers numbers_of(at::ScalarType type, NormOrder order) {
  if (is_supported_dtype(type)) return {to_dtype(type), 1};
  if (!c10::isComplexType(type) || order != NormOrder::kTwo) return {DType::kFloat32, 0};
  return {to_dtype(c10::toRealValueType(type)), 2};
}

// Whether a tensor's memory holds its values, up to conjugation and signs.
bool is_readable(const c10::TensorImpl& impl) {
  using Keys = c10::DispatchKeySet;
  static const Keys ignored = c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                              c10::autocast_dispatch_keyset | Keys(c10::DispatchKey::Conjugate) |
                              Keys(c10::DispatchKey::Negative);
  const Keys keys = impl.key_set() - ignored;
  return keys == Keys(c10::DispatchKey::CPU) || keys == Keys(c10::DispatchKey::CUDA);
}

// The gradients of a call. They are borrowed while the GIL is held, as in a step.
class Gradients {
 public:
  Gradients(NormOrder order, size_t num_params) : order_(order), num_params_(num_params) {
    read_.reserve(num_params);
  }

  // Adds the gradients of all parameters; false if one is not supported, or a parameter is not: a
  // DTensor without a gradient takes part in sums over processes.
  bool add_all(const py::tuple& params, const py::tuple& grads) {
    constexpr auto kAhead = static_cast<Py_ssize_t>(kBatch);
    const auto count = static_cast<Py_ssize_t>(params.size());
    const bool are_given = !grads.empty();
    std::array<const at::Tensor*, kBatch> batch;
    for (Py_ssize_t next = 0; next < count;) {
      size_t n = 0;
      for (; n < kBatch && next < count; ++n, ++next) {
        if (next + kAhead < count) prefetch(PyTuple_GET_ITEM(params.ptr(), next + kAhead));
        batch[n] = find_tensor(params, are_given ? &grads : nullptr, next);
      }
      if (!add_batch(batch.data(), n, are_given)) return false;
    }
    return true;
  }

  const std::vector<GradTable>& tables() const { return tables_; }  // none is empty
  int64_t num_tensors() const { return static_cast<int64_t>(read_.size()); }
  at::Device first_device() const { return first_device_.value_or(at::kCPU); }

  bool are_worth_the_gil() const {
    return std::any_of(tables_.begin(), tables_.end(), [](const GradTable& table) {
      return table.device != kHost || is_worth_the_gil(table.numel, table.rows.size());
    });
  }

  bool has_double() const { return has_double_; }

  // Keeps the memory alive without the GIL.
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages() const {
    std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages;
    storages.reserve(read_.size());
    for (const c10::TensorImpl* const impl : read_) {
      c10::StorageImpl* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
      storages.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    }
    return storages;
  }

 private:
  // As in CandidateWalk, cache misses of a batch overlap.
  static constexpr size_t kBatch = 16;

  // The parameter, or the gradient that was given instead of its own; null if that is None.
  static const at::Tensor* find_tensor(const py::tuple& params, const py::tuple* grads,
                                       Py_ssize_t index) {
    PyObject* object = PyTuple_GET_ITEM(params.ptr(), index);
    TORCH_CHECK_TYPE(is_tensor(object), "params[", index, "] must be a Tensor, not ",
                     type_name(object));
    if (grads != nullptr) {
      object = PyTuple_GET_ITEM(grads->ptr(), index);
      if (object == Py_None) return nullptr;
      TORCH_CHECK_TYPE(is_tensor(object), "grads[", index, "] must be a Tensor or None, not ",
                       type_name(object));
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (grads == nullptr) {
      prefetch(tensor.unsafeGetTensorImpl());  // only the pointer to its gradient is read
    } else {
      prefetch_grad(tensor);
    }
    return &tensor;
  }

  // All but the sizes, which are not read.
  static void prefetch_grad(const at::Tensor& grad) {
    const auto* const impl = reinterpret_cast<const char*>(grad.unsafeGetTensorImpl());
    prefetch(impl);
    static_assert(sizeof(c10::TensorImpl) > 128);
    prefetch_lines(impl + 128, sizeof(c10::TensorImpl) - 128);
  }

  bool add_batch(const at::Tensor** batch, size_t n, bool are_grads) {
    for (size_t i = 0; i < n && !are_grads; ++i) {
      const c10::TensorImpl& param = *batch[i]->unsafeGetTensorImpl();
      if (!is_readable(param)) return false;
      prefetch(param.autograd_meta());
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i] == nullptr) continue;
      if (!are_grads) batch[i] = &batch[i]->unsafeGetTensorImpl()->grad();
      if (!batch[i]->defined()) {
        batch[i] = nullptr;
      } else {
        prefetch_grad(*batch[i]);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i] == nullptr) continue;
      const c10::Storage& storage = batch[i]->unsafeGetTensorImpl()->unsafe_storage();
      prefetch(storage.unsafeGetStorageImpl());
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i] != nullptr && !add(*batch[i])) return false;
    }
    return true;
  }

  bool add(const at::Tensor& grad) {
    const c10::TensorImpl& impl = *grad.unsafeGetTensorImpl();
    const auto [dtype, per_element] = numbers_of(grad.scalar_type(), order_);
    if (!is_readable(impl) || per_element == 0 || !grad.is_non_overlapping_and_dense()) {
      return false;
    }
    const bool is_on_host = impl.device_type() == at::kCPU;
    if (!is_on_host && !kHasCuda) return false;
    has_double_ = has_double_ || dtype == DType::kFloat64;
    const int64_t numel = impl.numel() * per_element;
    if (!first_device_) first_device_ = impl.device();
    if (numel == 0) return true;
    // Without a check that reads another line of the cache; a storage without memory has no
    // address.
    c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
    const auto* const base = static_cast<const char*>(storage._mutable_data_ptr_no_checks().get());
    if (base == nullptr) return false;
    const void* const data = base + impl.storage_offset() * per_element * size_of(dtype);
    if (is_on_host) {
      prefetch(data);
    } else if (!is_aligned(data, dtype)) {  // GPUs fault on misaligned elements
      return false;
    }
    const auto position = static_cast<int64_t>(read_.size());
    table_of(is_on_host ? kHost : impl.device().index())
        .append({data, dtype, numel, position, 0, 0});
    read_.push_back(&impl);
    return true;
  }

  GradTable& table_of(int8_t device) {
    for (GradTable& table : tables_) {
      if (table.device == device) return table;
    }
    GradTable& table = tables_.emplace_back();
    table.device = device;
    if (tables_.size() == 1) table.rows.reserve(num_params_);  // usually the only table
    return table;
  }

  NormOrder order_;
  size_t num_params_;
  std::vector<GradTable> tables_;
  std::optional<at::Device> first_device_;
  bool has_double_ = false;
  std::vector<const c10::TensorImpl*> read_;
};

// The sum of each tensor of a table, at the tensor's position; zeros at those of other tables.
at::Tensor sum_tensors(NormOrder order, const GradTable& table, int64_t num_tensors) {
  const bool is_on_host = table.device == kHost;
  const auto options =
      at::TensorOptions(at::kDouble)
          .device(is_on_host ? at::Device(at::kCPU) : at::Device(at::kCUDA, table.device));
  const bool are_all = static_cast<int64_t>(table.rows.size()) == num_tensors;
  at::Tensor sums = are_all ? at::empty({num_tensors}, options) : at::zeros({num_tensors}, options);
  auto* const address = static_cast<double*>(sums.mutable_data_ptr());
  if (is_on_host) {
    cpu::sum_tensors(order, table, address);
  } else {
#if EMOPT_CUDA
    const at::Tensor block_sums = at::empty({table.num_blocks}, options);
    cuda::sum_tensors(order, table, static_cast<double*>(block_sums.mutable_data_ptr()), address);
#endif
  }
  return sums;
}

// The sum of tensors on several devices. Waits for none, unless the sum is on the host.
at::Tensor sum_on_devices(NormOrder order, const Gradients& gradients, at::Device device) {
  std::vector<at::Tensor> parts;
  for (const bool is_host : {false, true}) {  // devices first: they and the host work in parallel
    for (const GradTable& table : gradients.tables()) {
      if ((table.device == kHost) != is_host) continue;
      parts.push_back(sum_tensors(order, table, gradients.num_tensors()));
    }
  }
  // A tensor's sum is in one of them; adding the others' zeros changes nothing.
  at::Tensor sums;
  for (const at::Tensor& part : parts) {
    const at::Tensor here = part.to(device, /*non_blocking=*/device.is_cuda());
    sums = sums.defined() ? sums.add_(here) : here;
  }
  const auto* const address = static_cast<const double*>(sums.const_data_ptr());
  if (device.is_cpu()) {
    return at::scalar_tensor(cpu::add_tensors(order, address, gradients.num_tensors()),
                             at::kDouble);
  }
  at::Tensor sum = at::empty({}, at::TensorOptions(at::kDouble).device(device));
#if EMOPT_CUDA
  cuda::add_tensors(order, device.index(), address, gradients.num_tensors(),
                    static_cast<double*>(sum.mutable_data_ptr()));
#endif
  return sum;
}

at::Tensor sum_on_host(NormOrder order, const GradTable& table) {
  std::vector<double> sums(table.rows.size());
  cpu::sum_tensors(order, table, sums.data());
  const auto num_tensors = static_cast<int64_t>(sums.size());
  return at::scalar_tensor(cpu::add_tensors(order, sums.data(), num_tensors), at::kDouble);
}

at::Tensor sum_of(NormOrder order, const Gradients& gradients) {
  const at::Device device = gradients.first_device();
  const auto& tables = gradients.tables();
  if (tables.empty()) return at::zeros({}, at::TensorOptions(at::kDouble).device(device));
  if (tables.size() == 1 && tables[0].device == kHost && device.is_cpu()) {
    return sum_on_host(order, tables[0]);
  }
  return sum_on_devices(order, gradients, device);
}

}  // namespace

py::object norm_sum(py::handle params, py::handle grads, double order) {
  const at::NoGradGuard no_grad;
  if (torch::jit::tracer::isTracing() || is_seen_by_tracer()) return py::none();
  const py::tuple param_tuple = items("params", params);
  const py::tuple grad_tuple = grads.is_none() ? py::tuple() : items("grads", grads);
  TORCH_CHECK_VALUE(grads.is_none() || grad_tuple.size() == param_tuple.size(), "there are ",
                    grad_tuple.size(), " gradients for ", param_tuple.size(), " parameters");
  const NormOrder norm_order = read_order(order);
  Gradients gradients(norm_order, param_tuple.size());
  if (!gradients.add_all(param_tuple, grad_tuple)) return py::none();
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages;
  std::optional<py::gil_scoped_release> without_gil;
  if (gradients.are_worth_the_gil()) {
    storages = gradients.storages();
    without_gil.emplace();
  }
  const at::Tensor sum = sum_of(norm_order, gradients);
  without_gil.reset();
  return py::make_tuple(sum, gradients.has_double());
}

}  // namespace emopt
