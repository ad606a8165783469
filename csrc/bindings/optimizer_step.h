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
//   rules            for each group (rule, keys, state_names): a capsule of its RegisteredRule;
//   where
//                    the group has the rule's hyperparameters, see read_rule(); the keys of the
//                    states, in the rule's order
//   arguments        (grad_multiplier, grad_scale, found_inf, seed), of which the first three may
//                    be None, for 1, 1 and 0
//   grads            None, or for each group a list of what to take as the parameters' gradients
//   may_leave        whether what has to be stepped otherwise may remain
//
// A hyperparameter that is none raises before anything is changed; the caller then says which.
//
// Returns None where all are stepped, or for each group the indices of those that remain. Then the
// others are stepped if `may_leave`, and if no group has fused=True and any remaining; or else
// nothing is done. All remain where one of PyTorch's tracers is to see each operation.
py::object optimizer_step(const py::dict& state, const py::list& groups, const py::list& positions,
                          const py::list& rules, const py::tuple& arguments, py::handle grads,
                          bool may_leave);

}  // namespace emopt
