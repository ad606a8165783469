// An optimizer's step: one call walks the parameters of all groups, their gradients and their
// states, and sweeps them. Nothing is kept between calls, so what has been replaced meanwhile is
// seen.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <map>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "operand_checks.h"
#include "operators.h"
#include "python_arguments.h"

namespace emopt {

// Finds the parameters' states in a dictionary. A tensor's hash is computed by Python code, which
// takes longer than all else that a small parameter needs. But a dictionary keeps the order in
// which states were made, and that is mostly the parameters': so the next one is looked for from
// there on.
class StateWalk {
 public:
  explicit StateWalk(PyObject* dict) : dict_(dict) {}

  // Null where there is none, and where it was found before: a parameter that is there twice cannot
  // be stepped twice at a time.
  PyObject* find(PyObject* param) {
    PyObject *key, *value;
    while (is_in_order_ && PyDict_Next(dict_, &next_, &key, &value) != 0) {
      if (key != param) continue;
      found_.push_back(param);
      return value;
    }
    if (is_in_order_) found_before_.insert(found_.begin(), found_.end());
    is_in_order_ = false;  // once past the end, each by its hash
    if (!found_before_.insert(param).second) return nullptr;
    value = PyDict_GetItemWithError(dict_, param);
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* dict_;
  Py_ssize_t next_ = 0;
  bool is_in_order_ = true;
  std::vector<PyObject*> found_;  // in order
  std::unordered_set<PyObject*> found_before_;
};

// Looks up one state after the other: where they are in the dictionary as they are asked for, from
// the first on, by a comparison each.
class FieldWalk {
 public:
  explicit FieldWalk(PyObject* dict) : dict_(dict) {}

  // Null where there is none.
  PyObject* find(PyObject* name) {
    PyObject *key, *value;
    if (is_in_order_ && PyDict_Next(dict_, &next_, &key, &value) != 0 && key == name) return value;
    is_in_order_ = false;
    value = PyDict_GetItemWithError(dict_, name);
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* dict_;
  Py_ssize_t next_ = 0;
  bool is_in_order_ = true;
};

// A string that lives as long as the process, so that looking it up costs no new one.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

inline py::object attribute(PyObject* object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

// As THPVariable_Check, without a call of the metaclass's __instancecheck__ for each DTensor.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

// A DTensor, as its own part and where the others are. (Seen from outside: PyTorch has no C++ type
// for it.)
class Distributed {
 public:
  // Empty where the object is none.
  static std::optional<Distributed> from(PyObject* tensor) {
    static PyObject* const local_key = interned("_local_tensor");
    static PyObject* const spec_key = interned("_spec");
    if (THPVariable_CheckExact(tensor)) return {};
    auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, local_key));
    if (!local) {
      PyErr_Clear();
      return {};
    }
    return Distributed{std::move(local), attribute(tensor, spec_key)};
  }

  const py::object& local() const { return local_; }

  bool is_placed_as(Distributed& other) {
    // FSDP2's gradients have their parameters', and states one in common.
    if (spec_.is(other.spec_) || spec_.is(other.equal_spec_)) return true;
    read_place();
    other.read_place();
    const bool result = is_equal(placements_, other.placements_) && is_equal(mesh_, other.mesh_);
    if (result) other.equal_spec_ = spec_;
    return result;
  }

 private:
  Distributed(py::object local, py::object spec)
      : local_(std::move(local)), spec_(std::move(spec)) {}

  void read_place() {
    static PyObject* const mesh_key = interned("mesh");
    static PyObject* const placements_key = interned("placements");
    if (mesh_) return;
    placements_ = attribute(spec_.ptr(), placements_key);
    mesh_ = attribute(spec_.ptr(), mesh_key);
  }

  static bool is_equal(const py::object& a, const py::object& b) {
    const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (result < 0) throw py::error_already_set();
    return result != 0;
  }

  py::object local_, spec_;
  py::object mesh_, placements_;  // once they are asked for
  py::object equal_spec_;         // the last one that was
};

// A number that Python passes: a float, or a tensor of one element, read here only on the CPU.
class Scalar {
 public:
  Scalar(const char* name, py::handle value) {
    if (!is_tensor(value.ptr())) {
      number_.value = read_number(name, value);
      return;
    }
    const at::Tensor tensor = THPVariable_Unpack(value.ptr()).resolve_neg();
    TORCH_CHECK_VALUE(tensor.numel() == 1, name, " has ", tensor.numel(), " elements; expected 1");
    if (tensor.is_cuda()) {
      TORCH_CHECK_TYPE(is_plain(tensor), name, " must be a number or a plain tensor");
      const bool is_wide = tensor.scalar_type() != at::kFloat;
      on_device_.push_back(is_wide ? tensor.to(at::kDouble) : tensor);
    } else {
      number_.value = tensor.item().toDouble();
    }
  }
  // None is the number `none`.
  Scalar(const char* name, py::handle value, double none)
      : Scalar(value.is_none() ? Scalar(none) : Scalar(name, value)) {}

  bool is_on_device() const { return !on_device_.empty(); }

  // The number for work on a device; copied there where it is on another one.
  Number on(int8_t device) {
    if (!is_on_device()) return number_;
    const auto is_there = [&](const at::Tensor& copy) { return copy.get_device() == device; };
    auto found = std::find_if(on_device_.begin(), on_device_.end(), is_there);
    if (found == on_device_.end()) {
      const at::Device there(at::kCUDA, device);
      on_device_.push_back(on_device_.front().to(there, on_device_.front().scalar_type(), true));
      found = std::prev(on_device_.end());
    }
    const bool is_wide = found->scalar_type() == at::kDouble;
    return {0.0, found->const_data_ptr(),
            is_wide ? Number::Type::kFloat64 : Number::Type::kFloat32};
  }

 private:
  explicit Scalar(double number) : number_{number} {}

  Number number_;
  std::vector<at::Tensor> on_device_;  // one for each device that was asked for
};

// Where the elements of a plain tensor are; null where it has no memory.
C10_ALWAYS_INLINE void* memory_of(const at::Tensor& tensor, DType dtype, bool is_modified) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
  // Of its own, where it shared a copy-on-write storage.
  void* const base = is_modified ? storage.mutable_data() : const_cast<void*>(storage.data());
  if (base == nullptr) return nullptr;
  return static_cast<char*>(base) + impl.storage_offset() * size_of(dtype);
}

inline bool is_aligned(const void* address, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

// What all groups of a step share.
struct StepNumbers {
  Scalar grad_multiplier, grad_scale, found_inf;
};

// How a group is stepped, beside its rule.
struct GroupOptions {
  Scalar lr;
  ApplyUpdate epilogue;  // but for the numbers
  bool has_masters;
  bool has_remainders;  // of bfloat16 parameters, the masters are those
  bool is_capturable;
  bool must_be_native;      // all of it
  uint32_t first_position;  // of its parameters in the optimizer
};

// A step of the parameters of one group.
//
// Tensors are borrowed, not owned: counting references to them costs more than all else, since
// PyTorch counts some of them in Python, too. As long as other threads do not change parameters,
// gradients and states during the walk, that is safe; to sweep without the GIL, the memory is
// owned.
template <class Rule>
class GroupStep {
 public:
  // The keys of the states, in the order of the rule's.
  using StateNames = std::array<PyObject*, kNumStates<Rule>>;

 private:
  static constexpr size_t kOperands = kNumOperands<Rule, ApplyUpdate>;
  static constexpr size_t kOwn = kOperands - 1;  // the weight
  // Parameters that are walked together, each looking a little further than the last: what they
  // need from memory is then waited for at once, not parameter by parameter. On a Zen 4 core, a
  // step of 1000 parameters of 8 takes 0.96 of the time with 16 that it takes with 32 or 64.
  static constexpr size_t kBatch = 16;

 public:
  // `grads`, if it is not empty, has what to take as the parameters' gradients; None is for one
  // that has no gradient.
  GroupStep(const Rule& rule, GroupOptions options, const StateNames& state_names,
            StepNumbers& numbers, py::tuple params, py::tuple grads)
      : rule_(rule),
        options_(std::move(options)),
        state_names_(state_names),
        numbers_(numbers),
        params_(std::move(params)),
        grads_(std::move(grads)),
        num_params_(params_.size()) {
    TORCH_CHECK_VALUE(grads_.empty() || grads_.size() == num_params_, "there are ", grads_.size(),
                      " gradients for ", num_params_, " parameters");
  }

  size_t num_params() const { return num_params_; }
  bool must_be_native() const { return options_.must_be_native; }

  // Adds the parameters that have a gradient. Returns the indices of those that have to be stepped
  // otherwise: where a state is missing, or a tensor is none that an engine sweeps. `taken` is to
  // find parameters, and counters, with the same memory: they cannot be stepped at a time.
  std::vector<Py_ssize_t> take(StateWalk& states, AddressSet& taken) {
    std::vector<Py_ssize_t> left;
    std::array<Candidate, kBatch> batch;
    constexpr auto ahead = static_cast<Py_ssize_t>(kBatch);
    const auto count = static_cast<Py_ssize_t>(num_params_);
    PyObject* const params = params_.ptr();
    PyObject* const grads = grads_.empty() ? nullptr : grads_.ptr();
    read_.resize(num_params_);
    modified_.resize(num_params_ * kOperands);
    for (Py_ssize_t next = 0; next < count;) {
      size_t n = 0;
      for (; n < kBatch && next < count; ++next) {
        PyObject* const object = PyTuple_GET_ITEM(params, next);
        if (next + ahead < count) prefetch(PyTuple_GET_ITEM(params, next + ahead));
        TORCH_CHECK_TYPE(is_tensor(object), "params[", next, "] must be a Tensor");
        batch[n].index = next;
        batch[n].object = object;
        prefetch_tensor(THPVariable_Unpack(object));
        ++n;
      }
      find(batch.data(), n, grads, states);
      for (size_t i = 0; i < n; ++i) {
        if (batch[i].grad->defined() && !take(batch[i], taken)) left.push_back(batch[i].index);
      }
    }
    return left;
  }

  int64_t numel() const {
    int64_t numel = 0;
    for (const auto& [key, bucket] : buckets_) numel += bucket.table.numel;
    return numel;
  }
  bool any_on_device() const {
    return std::any_of(buckets_.begin(), buckets_.end(),
                       [](const auto& entry) { return entry.second.table.any_on_device; });
  }

  // Tells autograd what is about to be modified.
  void bump_versions() {
    for (size_t i = 0; i < num_modified_; ++i) modified_[i]->bump_version();
    for (c10::TensorImpl* const whole : wholes_) whole->bump_version();
  }

  // What keeps all memory alive.
  void own(std::vector<c10::intrusive_ptr<c10::StorageImpl>>& owned) const {
    const auto own_memory = [&](c10::TensorImpl* tensor) {
      c10::StorageImpl* const storage = tensor->unsafe_storage().unsafeGetStorageImpl();
      owned.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    };
    std::for_each_n(read_.begin(), num_read_, own_memory);
    std::for_each_n(modified_.begin(), num_modified_, own_memory);
  }

  // Does the step of all that was taken. Needs no GIL.
  void sweep() {
    for (auto& [key, bucket] : buckets_) {
      ApplyUpdate epilogue = options_.epilogue;
      epilogue.lr = options_.lr.on(key.device);
      epilogue.grad_multiplier = numbers_.grad_multiplier.on(key.device);
      epilogue.grad_scale = numbers_.grad_scale.on(key.device);
      epilogue.found_inf = numbers_.found_inf.on(key.device);
      emopt::sweep(rule_, {key.step}, epilogue, bucket.table);
      for (float* counter : bucket.counters) *counter = static_cast<float>(key.step);
    }
  }

 private:
  struct Candidate {
    Py_ssize_t index;
    PyObject* object;
    PyObject* given_grad;  // null where the gradient is the parameter's
    const at::Tensor* grad;
    PyObject* own;  // its states
    PyObject* step_object;
    std::array<PyObject*, kNumStates<Rule> + 1> states;  // and the master
    bool has_master;
    bool is_distributed;
    bool is_complete;  // whether there is something of everything
    const at::Tensor* step;
    std::array<const at::Tensor*, kOperands> operands;
  };

  // Rows that share a step: of one device, and one number that the host counts.
  struct Bucket {
    Table<kOperands> table;
    std::vector<float*> counters;
  };
  struct BucketKey {
    int8_t device;
    bool counts_on_device;
    double step;
    auto tied() const { return std::tie(device, counts_on_device, step); }
    bool operator<(const BucketKey& other) const { return tied() < other.tied(); }
  };

  // ---- the walk ---------------------------------------------------------------------------------

  static void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    static_cast<void>(address);
#endif
  }
  static void prefetch_lines(const void* address, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(address) + i);
  }
  static void prefetch_tensor(const at::Tensor& tensor) {
    prefetch_lines(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
  }
  static void prefetch_memory(const at::Tensor& tensor) {
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    prefetch(impl.unsafe_storage().unsafeGetStorageImpl());
    // The counter of versions: the one pointer in there.
    void* version = nullptr;
    static_assert(sizeof(c10::VariableVersion) == sizeof(version));
    std::memcpy(&version, &impl.version_counter(), sizeof(version));
    prefetch(version);
  }

  // Finds what belongs to each parameter.
  void find(Candidate* batch, size_t n, PyObject* grads, StateWalk& states) {
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    for (size_t i = 0; i < n; ++i) {
      prefetch(THPVariable_Unpack(batch[i].object).unsafeGetTensorImpl()->autograd_meta());
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      find_grad(c, grads);
      c.own = nullptr;
      c.is_complete = false;
      if (!c.grad->defined()) continue;
      prefetch_tensor(*c.grad);
      c.own = states.find(c.object);
      if (c.own != nullptr) prefetch(c.own);
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      if (c.own == nullptr) continue;
      if (PyDict_Check(c.own)) {
        prefetch_lines(reinterpret_cast<PyDictObject*>(c.own)->ma_keys, 192);
      } else {
        c.own = nullptr;
      }
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      c.states.fill(nullptr);
      if (c.own == nullptr) continue;
      FieldWalk fields(c.own);
      c.step_object = fields.find(step_key);
      for (size_t s = 0; s < kNumStates<Rule>; ++s) c.states[s] = fields.find(state_names_[s]);
      c.has_master = needs_master(THPVariable_Unpack(c.object));
      if (c.has_master) c.states.back() = fields.find(master_key);
      prefetch(c.step_object);
      for (PyObject* const state : c.states) prefetch(state);
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i].own != nullptr) unwrap(batch[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      if (!batch[i].is_complete) continue;
      prefetch_memory(*batch[i].step);
      for (const at::Tensor* operand : batch[i].operands) prefetch_memory(*operand);
    }
  }

  static void find_grad(Candidate& c, PyObject* grads) {
    c.given_grad = grads == nullptr ? nullptr : PyTuple_GET_ITEM(grads, c.index);
    if (c.given_grad == nullptr) {
      c.grad = &THPVariable_Unpack(c.object).unsafeGetTensorImpl()->grad();
    } else if (c.given_grad == Py_None) {
      static const at::Tensor none;
      c.grad = &none;
    } else {
      TORCH_CHECK_TYPE(THPVariable_Check(c.given_grad), "the gradient given for params[", c.index,
                       "] must be a Tensor");
      c.grad = &THPVariable_Unpack(c.given_grad);
    }
  }

  // From Python's objects to tensors; of DTensors, to their parts here.
  void unwrap(Candidate& c) {
    std::optional<Distributed> whole;
    if (!is_plain(THPVariable_Unpack(c.object))) whole = Distributed::from(c.object);
    if (whole && alive_.empty()) {  // mostly all others are, too
      alive_.reserve(num_params_ * (kOperands + 1));
      wholes_.reserve(num_params_ * (kNumStates<Rule> + 1));
    }
    const auto tensor_of = [&](PyObject* object) -> const at::Tensor* {
      if (object == nullptr || !is_tensor(object)) return nullptr;
      if (whole) {
        std::optional<Distributed> part = Distributed::from(object);
        if (!part || !part->is_placed_as(*whole)) return nullptr;
        object = part->local().ptr();
        alive_.push_back(part->local());
      }
      const at::Tensor& tensor = THPVariable_Unpack(object);
      prefetch_tensor(tensor);
      return &tensor;
    };
    c.operands[kUpdate] = c.operands[kOwn] = tensor_of(c.object);
    c.operands[kGrad] = c.grad;
    if (whole && c.given_grad != nullptr) {
      c.operands[kGrad] = tensor_of(c.given_grad);
    } else if (whole) {
      alive_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(*c.grad)));
      c.operands[kGrad] = tensor_of(alive_.back().ptr());
    }
    for (size_t s = 0; s < kNumStates<Rule>; ++s) {
      c.operands[kFirstState + s] = tensor_of(c.states[s]);
    }
    if (c.has_master) c.operands[kOwn] = tensor_of(c.states.back());
    c.is_distributed = whole.has_value();
    whole.reset();  // a counter is a tensor of each process
    c.step = tensor_of(c.step_object);
    c.is_complete = c.step != nullptr;
    for (const at::Tensor* operand : c.operands) c.is_complete &= operand != nullptr;
  }

  bool needs_master(const at::Tensor& param) const {
    return options_.has_masters &&
           (param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf);
  }

  // ---- one parameter ----------------------------------------------------------------------------

  // False, with nothing added, where it has to be stepped otherwise.
  bool take(Candidate& c, AddressSet& taken) {
    if (!c.is_complete) return false;
    if (c.operands[kUpdate]->is_complex() && !make_real(c)) return false;
    const at::Tensor& param = *c.operands[kUpdate];
    if (!is_plain(param) || !is_supported_dtype(param.scalar_type())) return false;
#if !EMOPT_CUDA
    if (!param.is_cpu()) return false;
#endif
    const bool is_contiguous = param.is_contiguous();
    if (!is_contiguous && !param.is_non_overlapping_and_dense()) return false;
    const auto lies_alike = [&](const at::Tensor& tensor) {
      return is_contiguous ? tensor.is_contiguous() : same_strides(tensor, param);
    };
    Row<kOperands> row;
    row.device = param.is_cuda() ? param.get_device() : kHost;
    row.position = options_.first_position + static_cast<uint32_t>(c.index);
    row.scale = 1.0;
    row.numel = param.numel();
    row.compute = DType::kFloat32;
    const bool is_halved =
        c.has_master && options_.has_remainders && param.scalar_type() == at::kBFloat16;
    if constexpr (kHasShapeScale<Rule>) {
      if (rule_.use_shape_scaling) {
        // Of the whole parameter, of which this may be a part.
        const at::Tensor& whole = THPVariable_Unpack(c.object);
        if (whole.dim() != 2) return false;  // the plain path has the error for it
        row.scale = Rule::shape_scale(whole.size(0), whole.size(1));
      }
    }
    for (size_t k = 0; k < kOperands; ++k) {
      const at::Tensor* operand = c.operands[k];
      if (k == kOwn && operand == &param) {
        row.dtype[k] = row.dtype[kUpdate];
        row.data[k] = row.data[kUpdate];
      } else {
        const bool is_remainder = is_halved && k == kOwn;
        if (is_remainder && operand->scalar_type() != at::kShort) return false;
        if (k != kUpdate && !(is_remainder ? is_beside : is_alike)(*operand, param)) return false;
        if (k != kUpdate && !lies_alike(*operand)) {
          if (k != kGrad) return false;
          // A copy of the gradient that lies in memory as the parameter does.
          owned_.push_back(at::empty_like(param, operand->options()).copy_(*operand));
          operand = c.operands[k] = &owned_.back();
        }
        row.dtype[k] = is_remainder                ? DType::kLowHalf
                       : is_halved && k == kUpdate ? DType::kHighHalf
                                                   : to_dtype(operand->scalar_type());
        row.data[k] = memory_of(*operand, row.dtype[k], k != kGrad);
        prefetch(row.data[k]);
        if (row.data[k] == nullptr && row.numel != 0) return false;
        // What the CPU takes, a GPU does not.
        if (row.device != kHost && !is_aligned(row.data[k], row.dtype[k])) return false;
      }
      if (is_read(static_cast<int>(k)) && row.dtype[k] == DType::kFloat64) {
        row.compute = DType::kFloat64;
      }
    }
    if (is_halved && row.device != kHost && row.compute == DType::kFloat64) return false;
    return append(c, row, taken);
  }

  bool append(const Candidate& c, Row<kOperands>& row, AddressSet& taken) {
    const at::Tensor& step = *c.step;
    const bool is_counter = is_plain(step) && step.scalar_type() == at::kFloat && step.numel() == 1;
    const bool counts_here = step.is_cpu();
    if (!is_counter || !(counts_here || step.get_device() == row.device)) return false;
    // Numbers that only a device knows need a counter there, and are of no use elsewhere.
    const bool must_count_there = options_.is_capturable || numbers_.found_inf.is_on_device();
    if (row.device == kHost ? needs_device() : counts_here && must_count_there) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    if (counter == nullptr || !is_new(counter, taken)) return false;
    if (row.numel != 0 && !is_new(row.data[kUpdate], taken)) return false;
    BucketKey key{row.device, !counts_here, 1.0};
    if (counts_here) {
      key.step = static_cast<double>(*counter + 1.0f);
      if (!(key.step >= 1.0)) return false;  // a NaN has no place among keys
    } else {
      row.step = counter;
    }
    Bucket& bucket = bucket_of(key);
    bucket.table.append(row);
    if (counts_here) bucket.counters.push_back(counter);
    read_[num_read_++] = c.operands[kGrad]->unsafeGetTensorImpl();
    modified_[num_modified_++] = step.unsafeGetTensorImpl();
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kGrad || (k == kOwn && c.operands[k] == c.operands[kUpdate])) continue;
      modified_[num_modified_++] = c.operands[k]->unsafeGetTensorImpl();
    }
    if (c.is_distributed) keep_wholes(c);
    return true;
  }

  // A DTensor has a version counter beside that of its part.
  void keep_wholes(const Candidate& c) {
    const auto keep = [&](PyObject* object) {
      c10::TensorImpl* const impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
      if (!impl->is_inference()) wholes_.push_back(impl);
    };
    keep(c.object);
    for (PyObject* const state : c.states) {
      if (state != nullptr) keep(state);
    }
  }

  bool needs_device() const {
    return options_.lr.is_on_device() || numbers_.grad_multiplier.is_on_device() ||
           numbers_.grad_scale.is_on_device() || numbers_.found_inf.is_on_device();
  }

  static bool is_new(const void* address, AddressSet& taken) {
    AddressSet::Entry& entry = taken.find(address);
    if (entry.address != nullptr) return false;
    entry.address = address;
    return true;
  }

  // Complex numbers are swept as pairs of real ones.
  bool make_real(Candidate& c) {
    const bool is_own_weight = c.operands[kOwn] == c.operands[kUpdate];
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kOwn && is_own_weight) {
        c.operands[k] = c.operands[kUpdate];
        continue;
      }
      const at::Tensor& tensor = *c.operands[k];
      // What is conjugated lazily does not lie in memory as its values are.
      const bool is_dense = tensor.is_complex() && tensor.layout() == at::kStrided;
      if (!is_dense || (tensor.is_conj() && k != kGrad)) return false;
      owned_.push_back(at::view_as_real(tensor.resolve_conj()));
      c.operands[k] = &owned_.back();
    }
    return true;
  }

  Bucket& bucket_of(const BucketKey& key) {
    if (last_ != nullptr && last_->first.tied() == key.tied()) return last_->second;
    const bool is_first = buckets_.empty();
    last_ = &*buckets_.try_emplace(key).first;
    if (is_first) last_->second.table.rows.reserve(num_params_);  // mostly there is no other
    return last_->second;
  }

  Rule rule_;
  GroupOptions options_;
  StateNames state_names_;
  StepNumbers& numbers_;
  py::tuple params_;
  py::tuple grads_;
  std::map<BucketKey, Bucket> buckets_;
  std::pair<const BucketKey, Bucket>* last_ = nullptr;
  size_t num_params_;
  std::list<at::Tensor> owned_;                    // tensors that were made here
  std::vector<py::object> alive_;                  // objects that nothing else may hold
  std::vector<c10::TensorImpl*> read_, modified_;  // of their full size, filled up to
  size_t num_read_ = 0, num_modified_ = 0;         // these
  std::vector<c10::TensorImpl*> wholes_;           // the DTensors among what is modified
};

}  // namespace emopt
