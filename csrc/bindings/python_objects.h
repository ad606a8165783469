// Access to the Python objects of an optimizer's step: dictionaries and DTensors.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

namespace emopt {

// A key for repeated lookups; lives as long as the process.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// A borrowed reference; null if the key is missing.
inline PyObject* find_item(PyObject* dict, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

inline py::object attribute(PyObject* object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

// Like THPVariable_Check, which would call the metaclass's __instancecheck__ for each DTensor.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

// Looks up keys that are mostly requested in the dictionary's order, by comparing objects. Hashing
// a tensor calls Python code, which would dominate the step of a small parameter.
class DictCursor {
 public:
  explicit DictCursor(PyObject* dict) : dict_(dict) {}

  // Whether all keys so far were found in order.
  bool is_in_order() const { return is_in_order_; }

  // A borrowed reference; null if the key is missing. After the first key that is out of order, all
  // are looked up by hash.
  PyObject* find(PyObject* wanted) {
    PyObject* const value = find_in_order(wanted);
    return value != nullptr ? value : find_item(dict_, wanted);
  }

  // Null if the key is missing or out of order. Needs the GIL, but any thread may call it.
  PyObject* find_in_order(PyObject* wanted) {
    PyObject *key, *value;
    while (is_in_order_ && PyDict_Next(dict_, &next_, &key, &value) != 0) {
      if (key == wanted) return value;
    }
    is_in_order_ = false;
    return nullptr;
  }

  // The entry after the last one found.
  Py_ssize_t next() const { return next_; }

  // Skips `count` entries if the key after them is `wanted`.
  void skip_to(PyObject* wanted, Py_ssize_t count) {
    PyObject* key;
    Py_ssize_t position = next_ + count;
    if (PyDict_Next(dict_, &position, &key, nullptr) != 0 && key == wanted) next_ += count;
  }

 private:
  PyObject* dict_;
  Py_ssize_t next_ = 0;
  bool is_in_order_ = true;
};

// Looks up the keys of a small dictionary, which are text, fastest in the dictionary's order.
class FieldCursor {
 public:
  explicit FieldCursor(PyObject* dict) : dict_(dict) {}

  // A borrowed reference; null if the key is missing, or an instance of a class of the user's.
  // Needs the GIL, but any thread may call it.
  PyObject* find(PyObject* wanted) {
    const Py_ssize_t start = next_;
    PyObject *key, *value;
    while (PyDict_Next(dict_, &next_, &key, &value) != 0) {
      if (is_same(key, wanted)) return value;
    }
    next_ = 0;
    while (next_ < start && PyDict_Next(dict_, &next_, &key, &value) != 0) {
      if (is_same(key, wanted)) return value;
    }
    return nullptr;
  }

 private:
  // Keys that were loaded from a file are other objects.
  static bool is_same(PyObject* key, PyObject* wanted) {
    if (key == wanted) return true;
    if (!PyUnicode_CheckExact(key) || PyUnicode_KIND(key) != PyUnicode_KIND(wanted)) return false;
    const Py_ssize_t length = PyUnicode_GET_LENGTH(wanted);
    if (PyUnicode_GET_LENGTH(key) != length) return false;
    const auto bytes = static_cast<size_t>(length) * static_cast<size_t>(PyUnicode_KIND(key));
    return std::memcmp(PyUnicode_DATA(key), PyUnicode_DATA(wanted), bytes) == 0;
  }

  PyObject* dict_;
  Py_ssize_t next_ = 0;
};

// A DTensor's local tensor and placement. (PyTorch has no C++ type for it.)
class DTensorView {
 public:
  // Empty if the object is not a DTensor.
  static std::optional<DTensorView> from(PyObject* tensor) {
    static PyObject* const local_key = interned("_local_tensor");
    static PyObject* const spec_key = interned("_spec");
    if (THPVariable_CheckExact(tensor)) return {};
    auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, local_key));
    if (!local) {
      PyErr_Clear();
      return {};
    }
    return DTensorView{std::move(local), attribute(tensor, spec_key)};
  }

  const py::object& local() const { return local_; }

  bool is_placed_as(DTensorView& other) {
    // Under FSDP2, a gradient shares its parameter's spec, and all states share one spec.
    if (spec_.is(other.spec_) || spec_.is(other.equal_spec_)) return true;
    read_place();
    other.read_place();
    const bool result = is_equal(placements_, other.placements_) && is_equal(mesh_, other.mesh_);
    if (result) other.equal_spec_ = spec_;
    return result;
  }

 private:
  DTensorView(py::object local, py::object spec)
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
  py::object mesh_, placements_;  // null until first compared
  py::object equal_spec_;         // the last spec found to be equal
};

// A DTensor's shard number and the index of its first element, for stochastic rounding
// (_sharding.py).
inline std::pair<uint64_t, uint64_t> shard_place(PyObject* tensor) {
  // Never freed: the interpreter may be finalized first.
  static const auto* const function =
      new py::object(py::module_::import("emerging_optimizers._sharding").attr("shard_place"));
  return (*function)(py::handle(tensor)).cast<std::pair<uint64_t, uint64_t>>();
}

// The same for 8-bit states, and a block's width and stride (operands.h).
inline std::tuple<uint64_t, uint64_t, int64_t, int64_t> state_place(PyObject* tensor) {
  static const auto* const function =
      new py::object(py::module_::import("emerging_optimizers._sharding").attr("state_place"));
  return (*function)(py::handle(tensor)).cast<std::tuple<uint64_t, uint64_t, int64_t, int64_t>>();
}

}  // namespace emopt
