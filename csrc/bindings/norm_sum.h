// The sum over all gradients from which their norm is computed.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace emopt {

// Adds up the magnitudes of the gradients' elements (order 1) or their squares (2), or finds the
// largest magnitude (infinity). See engine/norm.h for the order of the additions.
//
//   params   a sequence of tensors; those without a gradient are skipped
//   grads    None, or a gradient or None for each parameter, used instead of `param.grad`
//
// Returns a float64 scalar on the first gradient's device, and whether a gradient is float64 or
// complex128. Returns None, having computed nothing, if no engine supports one of the gradients, if
// a parameter is a tensor subclass, or while a PyTorch mode must see each operation.
py::object norm_sum(py::handle params, py::handle grads, double order);

}  // namespace emopt
