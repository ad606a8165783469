#include "../rules/signum.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(Signum)
