#include "../rules/adam.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(Adam)
EMOPT_RULE(AMSGrad)
