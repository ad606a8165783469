#include "tile_machine.h"

#include "../../rules/traced.h"
#include "../epilogue.h"
#include "isa.h"

namespace emopt::cpu {

namespace {

// A tile takes 1 KiB of each buffer; fewer elements if there are more than 32 buffers.
constexpr uint32_t kTileBytes = 1024;
constexpr uint32_t kTileBuffers = 32;

template <class Real>
int64_t tile_length(uint32_t num_buffers) {
  int64_t length = kTileBytes / sizeof(Real);
  while (num_buffers > kTileBuffers) {
    length /= 2;
    num_buffers = (num_buffers + 1) / 2;
  }
  return length;
}

}  // namespace

}  // namespace emopt::cpu

#define EMOPT_INCLUDE "tile_loop.inl"
#include "for_each_isa.inl"
#undef EMOPT_INCLUDE

namespace emopt::cpu {

TileOp tile_op(const std::string& name) {
#define EMOPT_FIND(op, arity, text, expression) \
  if (name == text) return TileOp::op;
  EMOPT_FOR_EACH_TILE_OP(EMOPT_FIND)
#undef EMOPT_FIND
  return TileOp::kCount;
}

#define EMOPT_LOOPS(isa)                                                           \
  {                                                                                \
    {&isa::tile_loop<StoreUpdate, float>, &isa::tile_loop<StoreUpdate, double>}, { \
      &isa::tile_loop<ApplyUpdate, float>, &isa::tile_loop<ApplyUpdate, double>    \
    }                                                                              \
  }

TileLoops tile_loops() {
  return {{
      EMOPT_LOOPS(baseline),
#if EMOPT_COMPILES_AVX2
      EMOPT_LOOPS(avx2),
#else
      {},
#endif
#if EMOPT_COMPILES_AVX512
      EMOPT_LOOPS(avx512),
#else
      {},
#endif
  }};
}

}  // namespace emopt::cpu
