#include "unit.h"

#define EMOPT_UNIT baseline
#include "tile_loop.inl"
