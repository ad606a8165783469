// Rules in shared libraries of their own (engine/rule_unit.h).
#pragma once

#include <string>

#include "operators.h"

namespace emopt {

// Loads the rule of a struct `name` and registers it. The library stays loaded.
const RegisteredRule& load_rule(const std::string& path, const std::string& name);

}  // namespace emopt
