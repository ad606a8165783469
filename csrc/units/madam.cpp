#include "../rules/madam.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(MAdam)
