#include "../engine/cuda/kernel.h"
#include "../rules/rmsprop.h"
EMOPT_CUDA_RULE(RMSprop)
EMOPT_CUDA_RULE(RMSpropCentered)
EMOPT_CUDA_RULE(RMSpropCenteredMomentum)
EMOPT_CUDA_RULE(RMSpropMomentum)
