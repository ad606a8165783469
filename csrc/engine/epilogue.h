// What becomes of a rule's update, element by element.
#pragma once

#include "../rules/rule.h"

namespace emopt {

// It is stored, times the row's scale. (A scale of 1 changes no bit.)
template <class Real>
struct StoreUpdate {
  Real scale;

  EMOPT_FN Real operator()(Real update) const { return update * scale; }
};

}  // namespace emopt
