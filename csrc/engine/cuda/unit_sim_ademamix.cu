#include "../../rules/sim_ademamix.h"
#include "kernel.h"

namespace emopt::cuda {
EMOPT_INSTANTIATE_KERNELS(SimAdEMAMix)
}
