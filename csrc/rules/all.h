// The list of all rules.
#pragma once

#include "adam.h"
#include "ademamix.h"
#include "laprop.h"
#include "lion.h"
#include "madam.h"
#include "rmsprop.h"
#include "signum.h"
#include "sim_ademamix.h"

#define EMOPT_FOR_EACH_RULE(APPLY) \
  APPLY(Adam)                      \
  APPLY(AMSGrad)                   \
  APPLY(AdEMAMix)                  \
  APPLY(LaProp)                    \
  APPLY(Lion)                      \
  APPLY(MAdam)                     \
  APPLY(RMSprop)                   \
  APPLY(RMSpropCentered)           \
  APPLY(RMSpropCenteredMomentum)   \
  APPLY(RMSpropMomentum)           \
  APPLY(Signum)                    \
  APPLY(SimplifiedAdEMAMix)
