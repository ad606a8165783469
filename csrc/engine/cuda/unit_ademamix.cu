#include "../../rules/ademamix.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(AdEMAMix)
