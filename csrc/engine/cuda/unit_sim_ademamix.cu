#include "../../rules/sim_ademamix.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(SimAdEMAMix)
