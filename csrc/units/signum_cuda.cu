#include "../engine/cuda/kernel.h"
#include "../rules/signum.h"
EMOPT_CUDA_RULE(Signum)
