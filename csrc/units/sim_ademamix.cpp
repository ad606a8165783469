#include "../rules/sim_ademamix.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(SimplifiedAdEMAMix)
