#include "python_arguments.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>

#include "hyperparameters.h"

namespace py = pybind11;

namespace emopt {

namespace {

// Error messages show values up to these limits.
constexpr Py_ssize_t kMaxText = 40;
constexpr double kMaxNumber = 1e15;

// A number's value; empty if the object is not a number.
std::optional<double> as_number(py::handle value) {
  if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyUnicode_Check(value.ptr())) return std::nullopt;  // numpy.str_ converts to a double
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    // These mean that it is no number, or too large for a double. Others, such as
    // KeyboardInterrupt, propagate.
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0 &&
        PyErr_ExceptionMatches(PyExc_ValueError) == 0 &&
        PyErr_ExceptionMatches(PyExc_RuntimeError) == 0 &&
        PyErr_ExceptionMatches(PyExc_OverflowError) == 0) {
      throw py::error_already_set();
    }
    PyErr_Clear();
    return std::nullopt;
  }
  return number;
}

// A value's type, followed by the value if it is short.
std::string described(py::handle value) {
  std::string text = type_name(value.ptr());
  text.erase(0, text.rfind('.') + 1);  // numpy's type names include the module
  py::object shown;
  if (PyUnicode_Check(value.ptr())) {
    if (PyUnicode_GET_LENGTH(value.ptr()) <= kMaxText) shown = py::str(value);
  } else if (PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr())) {
    const bool is_short = std::abs(PyFloat_AsDouble(value.ptr())) < kMaxNumber;
    if (is_short && PyErr_Occurred() == nullptr) shown = py::reinterpret_borrow<py::object>(value);
    PyErr_Clear();  // an int too large for a double
  }
  if (shown) text += " (" + py::repr(shown).cast<std::string>() + ")";
  return text;
}

// The cure for a number that was passed as a string.
std::string advice(py::handle value) {
  if (!PyUnicode_Check(value.ptr()) || PyUnicode_GET_LENGTH(value.ptr()) > kMaxText) return "";
  const auto number = py::reinterpret_steal<py::object>(PyFloat_FromString(value.ptr()));
  if (!number) {
    PyErr_Clear();
    return "";
  }
  const std::string convert = "convert it with float()";
  auto text = py::str(value.attr("strip")()).cast<std::string>();
  const size_t mark = text.find_first_of("eE");
  if (mark == std::string::npos || text.find('_') != std::string::npos) return "; " + convert;
  std::string mantissa = text.substr(0, mark);
  std::string exponent = text.substr(mark + 1);
  if (mantissa.find('.') == std::string::npos) mantissa += ".0";
  if (exponent[0] != '+' && exponent[0] != '-') exponent = "+" + exponent;
  if (mantissa.size() + 1 + exponent.size() == text.size()) return "; " + convert;
  return "; YAML reads " + text + " as text: write " + mantissa + "e" + exponent + ", or " +
         convert;
}

// Whether a value can be indexed by position: a list, a tuple, an array, a ParameterList.
bool is_sequence(PyObject* value) {
  return (PySequence_Check(value) || PyMapping_Check(value)) && !PyUnicode_Check(value) &&
         !PyDict_Check(value);
}

}  // namespace

const char* type_name(PyObject* value) {
  const char* const name = Py_TYPE(value)->tp_name;
  const char* const dot = std::strrchr(name, '.');  // after the module, for types in C
  return dot == nullptr ? name : dot + 1;
}

PyObject* items_of(PyObject* value) {
  if (!is_sequence(value)) return nullptr;
  PyObject* const items = PySequence_Tuple(value);
  if (items == nullptr) {  // for example a numpy scalar
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return items;
}

int64_t read_whole_number(const char* name, PyObject* value, const char* expected) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value));
  if (index) {
    int overflow = 0;
    const int64_t integer = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    TORCH_CHECK_VALUE(overflow == 0, name, " is beyond the range of int64");
    return integer;
  }
  PyErr_Clear();
  const auto number = as_number(value);
  TORCH_CHECK_TYPE(number.has_value(), name, " must be ", expected, ", not ", described(value),
                   advice(value));
  TORCH_CHECK_VALUE(!std::isnan(*number), name, " is nan; expected a whole number");
  TORCH_CHECK_TYPE(std::isfinite(*number) && std::floor(*number) == *number, name, " is ",
                   number_text(*number), "; expected a whole number");
  TORCH_CHECK_VALUE(std::abs(*number) < 0x1p63, name, " is beyond the range of int64");
  return static_cast<int64_t>(*number);
}

double read_number(const char* name, PyObject* value) {
  const auto number = as_number(value);
  TORCH_CHECK_TYPE(number.has_value(), name, " must be a number, not ", described(value),
                   advice(value));
  return *number;
}

std::optional<double> read_optional_number(const char* name, PyObject* value) {
  if (value == Py_None) return std::nullopt;
  const auto number = as_number(value);
  TORCH_CHECK_TYPE(number.has_value(), name, " must be a number or None, not ", described(value),
                   advice(value));
  return number;
}

bool read_flag(const char* name, PyObject* value) {
  if (value == Py_True) return true;
  if (value == Py_False) return false;
  const std::string type = Py_TYPE(value)->tp_name;
  TORCH_CHECK_TYPE(type == "numpy.bool" || type == "numpy.bool_", name, " must be a bool, not ",
                   described(value), advice(value));
  return PyObject_IsTrue(value) == 1;
}

std::optional<int64_t> read_warmup_steps(const char* name, PyObject* value) {
  if (value == Py_None) return std::nullopt;
  return read_whole_number(name, value, "a whole number or None");
}

c10::SmallVector<double, 3> read_numbers(const char* name, PyObject* value) {
  const auto items = py::reinterpret_steal<py::object>(items_of(value));
  TORCH_CHECK_TYPE(items, name, " must be a sequence of numbers, not ", described(value));
  c10::SmallVector<double, 3> numbers;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
    const py::handle item = PyTuple_GET_ITEM(items.ptr(), i);
    const auto number = as_number(item);
    TORCH_CHECK_TYPE(number.has_value(), name, "[", i, "] must be a number, not ", described(item),
                     advice(item));
    numbers.push_back(*number);
  }
  return numbers;
}

}  // namespace emopt
