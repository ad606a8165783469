#include "../rules/rmsprop.h"

#include "../engine/rule_unit.h"
EMOPT_RULE(RMSprop)
EMOPT_RULE(RMSpropCentered)
EMOPT_RULE(RMSpropCenteredMomentum)
EMOPT_RULE(RMSpropMomentum)
