#include "../rules/laprop.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(LaProp)
