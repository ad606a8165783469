// An optimizer's step: one call collects the parameters, gradients and states of all groups, and
// updates them. It keeps nothing between calls, so users may replace any tensor in between.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstdint>

#include "operators.h"

namespace emopt {

// Updates all parameters that have a gradient.
//
//   state            the optimizer's `state`: a dictionary of each parameter's states
//   groups           the optimizer's `param_groups`
//   positions        the index, in the optimizer, of each group's first parameter
//   rules            for each group (rule, keys, state_names): a capsule of its RegisteredRule; the
//                    keys of the rule's hyperparameters, see read_rule(); the keys of the states,
//                    in the rule's order
//   arguments        (grad_multiplier, grad_scale, found_inf, seed); None for one of the first
//                    three means 1, 1 and 0
//   grads            None, or a list of gradients for each group, used instead of `param.grad`
//   may_leave        whether parameters that no engine supports may remain
//
// An invalid hyperparameter raises before anything is modified; the caller adds the group's name.
//
// Returns None if all were updated; otherwise, for each group, the indices of those that remain.
// The others were updated if `may_leave` is set and no parameter of a group with fused=True
// remains; otherwise nothing was. All remain while a PyTorch mode must see each operation.
py::object optimizer_step(const py::dict& state, const py::list& groups, const py::list& positions,
                          const py::list& rules, const py::tuple& arguments, py::handle grads,
                          bool may_leave);

// How many groups' parameters were collected by several threads; for tests.
int64_t count_walks_on_threads();

}  // namespace emopt
