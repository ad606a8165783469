#include "../../rules/signum.h"
#include "kernel.h"
EMOPT_INSTANTIATE_KERNELS(Signum)
