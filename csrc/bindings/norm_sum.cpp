#include "norm_sum.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cmath>
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

namespace emopt {

namespace {

// The number of elements from which releasing the GIL pays off.
constexpr int64_t kWorthTheGil = 1 << 18;

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

// The type of a gradient's real numbers, and how many of them an element has; none if it is not
// supported. A complex number's square is the sum of two.
std::optional<std::pair<DType, int64_t>> numbers_of(at::ScalarType type, NormOrder order) {
  if (is_supported_dtype(type)) return std::pair(to_dtype(type), int64_t{1});
  if (!c10::isComplexType(type) || order != NormOrder::kTwo) return std::nullopt;
  return std::pair(to_dtype(c10::toRealValueType(type)), int64_t{2});
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
  explicit Gradients(NormOrder order) : order_(order) {}

  // Adds the gradients of all parameters; false if one is not supported, or a parameter is not: a
  // DTensor without a gradient takes part in sums over processes.
  bool add_all(const py::tuple& params, const py::tuple& grads) {
    const auto count = static_cast<Py_ssize_t>(params.size());
    table_.rows.reserve(params.size());
    read_.reserve(params.size());
    std::array<const at::Tensor*, kBatch> batch;
    for (Py_ssize_t next = 0; next < count;) {
      size_t n = 0;
      for (; n < kBatch && next < count; ++n, ++next) {
        batch[n] = find_tensor(params, grads, next);
      }
      if (!add_batch(batch.data(), n, !grads.empty())) return false;
    }
    return true;
  }

  const GradTable& table() const { return table_; }

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
  static const at::Tensor* find_tensor(const py::tuple& params, const py::tuple& grads,
                                       Py_ssize_t index) {
    constexpr auto kAhead = static_cast<Py_ssize_t>(kBatch);
    PyObject* const ahead = index + kAhead < static_cast<Py_ssize_t>(params.size())
                                ? PyTuple_GET_ITEM(params.ptr(), index + kAhead)
                                : nullptr;
    prefetch(ahead);
    PyObject* object = PyTuple_GET_ITEM(params.ptr(), index);
    TORCH_CHECK_TYPE(is_tensor(object), "params[", index, "] must be a Tensor, not ",
                     type_name(object));
    if (!grads.empty()) {
      object = PyTuple_GET_ITEM(grads.ptr(), index);
      if (object == Py_None) return nullptr;
      TORCH_CHECK_TYPE(is_tensor(object), "grads[", index, "] must be a Tensor or None, not ",
                       type_name(object));
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    prefetch_lines(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    return &tensor;
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
        prefetch_lines(batch[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      }
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i] == nullptr) continue;
      const c10::Storage& storage = batch[i]->unsafeGetTensorImpl()->unsafe_storage();
      prefetch_lines(storage.unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i] != nullptr && !add(*batch[i])) return false;
    }
    return true;
  }

  bool add(const at::Tensor& grad) {
    const c10::TensorImpl& impl = *grad.unsafeGetTensorImpl();
    const auto numbers = numbers_of(grad.scalar_type(), order_);
    if (!is_readable(impl) || !numbers || !grad.is_non_overlapping_and_dense()) return false;
    if (!grad.is_cpu()) return false;
    const auto [dtype, per_element] = *numbers;
    has_double_ = has_double_ || dtype == DType::kFloat64;
    const int64_t numel = impl.numel() * per_element;
    if (numel == 0) return true;
    c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
    const char* const base = static_cast<const char*>(storage.data());
    if (base == nullptr) return false;
    const void* const data = base + impl.storage_offset() * per_element * size_of(dtype);
    prefetch(data);
    table_.append({data, dtype, kHost, numel, static_cast<int64_t>(table_.rows.size()), 0, 0});
    read_.push_back(&impl);
    return true;
  }

  NormOrder order_;
  GradTable table_;
  bool has_double_ = false;
  std::vector<const c10::TensorImpl*> read_;
};

double sum_on_host(NormOrder order, const GradTable& table) {
  std::vector<double> tensor_sums(table.rows.size());
  cpu::sum_tensors(order, table, tensor_sums.data());
  return cpu::add_tensors(order, tensor_sums.data(), static_cast<int64_t>(tensor_sums.size()));
}

}  // namespace

py::object norm_sum(py::handle params, py::handle grads, double order) {
  const at::NoGradGuard no_grad;
  if (torch::jit::tracer::isTracing() || is_seen_by_tracer()) return py::none();
  const py::tuple param_tuple = items("params", params);
  const py::tuple grad_tuple = grads.is_none() ? py::tuple() : items("grads", grads);
  TORCH_CHECK_VALUE(grads.is_none() || grad_tuple.size() == param_tuple.size(), "there are ",
                    grad_tuple.size(), " gradients for ", param_tuple.size(), " parameters");
  Gradients gradients(read_order(order));
  if (!gradients.add_all(param_tuple, grad_tuple)) return py::none();
  double sum = 0.0;
  if (gradients.table().numel >= kWorthTheGil) {
    const auto storages = gradients.storages();
    const py::gil_scoped_release without_gil;
    sum = sum_on_host(read_order(order), gradients.table());
  } else {
    sum = sum_on_host(read_order(order), gradients.table());
  }
  return py::make_tuple(at::scalar_tensor(sum, at::kDouble), gradients.has_double());
}

}  // namespace emopt
