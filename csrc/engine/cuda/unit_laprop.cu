#include "../../rules/laprop.h"
#include "kernel.h"

namespace emopt::cuda {
EMOPT_INSTANTIATE_KERNELS(LaProp)
}
