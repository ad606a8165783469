#include "../engine/cuda/kernel.h"
#include "../rules/adam.h"
EMOPT_CUDA_RULE(Adam)
EMOPT_CUDA_RULE(AMSGrad)
