#include "../../rules/lion.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(Lion)
