#include "../engine/cuda/kernel.h"
#include "../rules/ademamix.h"
EMOPT_CUDA_RULE(AdEMAMix)
