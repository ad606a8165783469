#include "../../rules/laprop.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(LaProp)
