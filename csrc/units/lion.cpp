#include "../rules/lion.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(Lion)
