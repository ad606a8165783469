// Functions for a rule's `check()`, which runs on the host.
#pragma once

#include <cstdio>

#include "rule.h"

namespace emopt {

// Rejects a beta whose half-life is not finite.
inline void check_half_life(ErrorText& error, const char* name, double beta, int64_t warmup_steps) {
  if (!error.is_empty() || warmup_steps == 0 || beta + 1e-8 < 1.0) return;
  std::snprintf(error.text, error.capacity,
                "%s is too close to 1 to be warmed up: expected %s + 1e-8 < 1; pass None as the "
                "number of warm-up steps to use it from the first step",
                name, name);
}

}  // namespace emopt
