#include "../../rules/ademamix.h"
#include "kernel.h"

namespace emopt::cuda {
EMOPT_INSTANTIATE_KERNELS(AdEMAMix)
}
