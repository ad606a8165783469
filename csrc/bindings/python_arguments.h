// Reads arguments from Python. Error messages name the argument.
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/python_stub.h>

#include <cstdint>
#include <optional>

namespace emopt {

double read_number(const char* name, PyObject* value);
std::optional<double> read_optional_number(const char* name, PyObject* value);
bool read_flag(const char* name, PyObject* value);
int64_t read_whole_number(const char* name, PyObject* value, const char* expected);
std::optional<int64_t> read_warmup_steps(const char* name, PyObject* value);
c10::SmallVector<double, 3> read_numbers(const char* name, PyObject* value);

const char* type_name(PyObject* value);

// The items of a sequence as a tuple, a new reference; null if the object is not a sequence.
PyObject* items_of(PyObject* value);

}  // namespace emopt
