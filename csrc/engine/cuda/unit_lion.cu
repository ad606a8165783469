#include "../../rules/lion.h"
#include "kernel.h"

namespace emopt::cuda {
EMOPT_INSTANTIATE_KERNELS(Lion)
}
