#include "../../rules/adam.h"
#include "kernel.h"

namespace emopt::cuda {
EMOPT_INSTANTIATE_KERNELS(Adam)
}
