// What an optimizer's step reads of Python's objects: states in dictionaries, DTensors, numbers,
// and the memory of tensors.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/dtypes.h"
#include "../engine/number.h"
#include "operand_checks.h"
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

// What the random bits of a DTensor's shard depend on (_sharding.py): its number, and the index of
// its first element.
inline std::pair<uint64_t, uint64_t> shard_place(PyObject* tensor) {
  // Never freed: the interpreter may be gone before this.
  static const auto* const function =
      new py::object(py::module_::import("emerging_optimizers._sharding").attr("shard_place"));
  return (*function)(py::handle(tensor)).cast<std::pair<uint64_t, uint64_t>>();
}

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
      const at::Scalar number = tensor.item();
      const bool is_real = !number.isComplex() || number.toComplexDouble().imag() == 0.0;
      TORCH_CHECK_TYPE(is_real, name, " must be a number, not Tensor");
      number_.value = number.toDouble();
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

inline bool is_aligned(const void* address, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

}  // namespace emopt
