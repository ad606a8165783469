#include "../engine/cuda/kernel.h"
#include "../rules/sim_ademamix.h"
EMOPT_CUDA_RULE(SimplifiedAdEMAMix)
