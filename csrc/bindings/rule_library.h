// Rules in shared libraries.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>

#include "operators.h"

namespace emopt {

// Loads the rule of a struct from a shared library, which stays loaded, and registers it.
const RegisteredRule& load_rule(const std::string& path, const std::string& symbol,
                                const std::string& operator_namespace, const std::string& name);

// Replaces the interpreter of a rule by the compiled loops of a shared library.
void attach_library(const RegisteredRule& rule, const std::string& path, const std::string& symbol);

// What Python needs to know of a rule in a shared library before it is registered.
py::dict rule_info(const std::string& path, const std::string& symbol);

}  // namespace emopt
