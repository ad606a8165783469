// An optimizer's step: one call walks the parameters of all groups, their gradients and their
// states, and sweeps them. Nothing is kept between calls, so what has been replaced meanwhile is
// seen.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "operators.h"

namespace emopt {

// Steps the parameters of groups that have a gradient.
//
//   state            a dictionary of their states' dictionaries
//   groups           the optimizer's own dictionaries
//   positions        the number, in the optimizer, of each group's first parameter
//   rules            for each group (rule, keys, state_names): a capsule of its RegisteredRule; the
//                    keys of the rule's hyperparameters, see read_rule(); the keys of the states,
//                    in the rule's order
//   arguments        (grad_multiplier, grad_scale, found_inf, seed), of which the first three may
//                    be None, for 1, 1 and 0
//   grads            None, or for each group a list of gradients, in place of `param.grad`
//   may_leave        whether parameters that no engine sweeps may remain
//
// An invalid hyperparameter raises before anything is changed; the caller adds the group's name.
//
// Returns None if all were stepped; otherwise, for each group, the indices of those that remain.
// The others were stepped if `may_leave` is set and no group with fused=True has any remaining; if
// not, nothing was done. All remain while one of PyTorch's tracers has to see each operation.
py::object optimizer_step(const py::dict& state, const py::list& groups, const py::list& positions,
                          const py::list& rules, const py::tuple& arguments, py::handle grads,
                          bool may_leave);

}  // namespace emopt
