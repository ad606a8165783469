// The list of all rules.
#pragma once

#define EMOPT_FOR_EACH_RULE(APPLY) \
  APPLY(Adam)                      \
  APPLY(AdEMAMix)                  \
  APPLY(LaProp)                    \
  APPLY(Lion)                      \
  APPLY(Signum)                    \
  APPLY(SimplifiedAdEMAMix)
