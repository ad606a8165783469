// The function through which eager Python calls a rule.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "operators.h"

namespace emopt {

// A function of the documented arguments in their order, then `out`. It lives as long as the
// process.
py::object entry_point(const RegisteredRule& rule);

}  // namespace emopt
