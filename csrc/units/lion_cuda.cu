#include "../engine/cuda/kernel.h"
#include "../rules/lion.h"
EMOPT_CUDA_RULE(Lion)
