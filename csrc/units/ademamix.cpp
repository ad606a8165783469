#include "../rules/ademamix.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(AdEMAMix)
