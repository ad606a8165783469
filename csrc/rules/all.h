// The list of all rules.
#pragma once

#include "adam.h"
#include "ademamix.h"
#include "laprop.h"
#include "lion.h"
#include "signum.h"
#include "sim_ademamix.h"

#define EMOPT_FOR_EACH_RULE(APPLY) \
  APPLY(Adam)                      \
  APPLY(AdEMAMix)                  \
  APPLY(LaProp)                    \
  APPLY(Lion)                      \
  APPLY(Signum)                    \
  APPLY(SimplifiedAdEMAMix)
