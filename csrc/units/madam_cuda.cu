#include "../engine/cuda/kernel.h"
#include "../rules/madam.h"
EMOPT_CUDA_RULE(MAdam)
