#include "../../rules/adam.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(Adam)
