// Fetches memory into the caches ahead of its use. No effect where the compiler has no instruction
// for it; any address is valid.
#pragma once

#include <cstddef>

#include "../rules/rule.h"

namespace emopt {

EMOPT_FN void prefetch(const void* address) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  __builtin_prefetch(address);
#else
  static_cast<void>(address);
#endif
}

// An object of at most 64 bytes, which may lie on two lines.
EMOPT_FN void prefetch_ends(const void* address, size_t bytes) {
  prefetch(address);
  prefetch(static_cast<const char*>(address) + bytes - 1);
}

EMOPT_FN void prefetch_lines(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(address) + i);
}

}  // namespace emopt
