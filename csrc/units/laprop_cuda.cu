#include "../engine/cuda/kernel.h"
#include "../rules/laprop.h"
EMOPT_CUDA_RULE(LaProp)
