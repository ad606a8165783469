// The tile machine: runs the elements' part of a program, an operation at a time over tiles that
// stay in the L1 cache. Its results have the bits of the compiled rule's, since each operation
// rounds its results in either.
#pragma once

#include <string>

#include "../program.h"

namespace emopt::cpu {

// The operations. APPLY(name, number of operands, name in traces, expression of a, b and c). A
// condition is 1 or 0.
#define EMOPT_FOR_EACH_TILE_OP(APPLY)                                    \
  APPLY(kCopy, 1, "copy", a)                                             \
  APPLY(kNegate, 1, "neg", -a)                                           \
  APPLY(kSquareRoot, 1, "sqrt", square_root(a))                          \
  APPLY(kReciprocalRoot, 1, "rsqrt", reciprocal_root(a))                 \
  APPLY(kAbsolute, 1, "abs", absolute(a))                                \
  APPLY(kSign, 1, "sign", emopt::sign(a))                                \
  APPLY(kNot, 1, "!", as_number<Real>(!(a != Real(0))))                  \
  APPLY(kAdd, 2, "+", a + b)                                             \
  APPLY(kSubtract, 2, "-", a - b)                                        \
  APPLY(kMultiply, 2, "*", a* b)                                         \
  APPLY(kDivide, 2, "/", a / b)                                          \
  APPLY(kMaximum, 2, "max", maximum(a, b))                               \
  APPLY(kMinimum, 2, "min", minimum(a, b))                               \
  APPLY(kAtLeast, 2, "at_least", at_least(a, b))                         \
  APPLY(kAtMost, 2, "at_most", at_most(a, b))                            \
  APPLY(kCopySign, 2, "copysign", copy_sign(a, b))                       \
  APPLY(kLess, 2, "<", as_number<Real>(a < b))                           \
  APPLY(kLessEqual, 2, "<=", as_number<Real>(a <= b))                    \
  APPLY(kGreater, 2, ">", as_number<Real>(a > b))                        \
  APPLY(kGreaterEqual, 2, ">=", as_number<Real>(a >= b))                 \
  APPLY(kEqual, 2, "==", as_number<Real>(a == b))                        \
  APPLY(kNotEqual, 2, "!=", as_number<Real>(a != b))                     \
  APPLY(kAnd, 2, "&&", as_number<Real>((a != Real(0)) & (b != Real(0)))) \
  APPLY(kOr, 2, "||", as_number<Real>((a != Real(0)) | (b != Real(0))))  \
  APPLY(kWhere, 3, "where", a != Real(0) ? b : c)

enum class TileOp : uint8_t {
#define EMOPT_NAME(name, arity, text, expression) name,
  EMOPT_FOR_EACH_TILE_OP(EMOPT_NAME)
#undef EMOPT_NAME
      kCount
};

// The operation of a name in traces; kCount if there is none.
TileOp tile_op(const std::string& name);

// The most buffers of a case, and the most locations.
inline constexpr uint32_t kMaxTileBuffers = 256;
inline constexpr uint32_t kMaxTileLocations = 1024;

// The loops of the tile machine, in RuleInfo's order.
struct TileLoops {
  ElementLoop loops[kNumIsas][kNumEpilogues][kNumPrecisions];
};
TileLoops tile_loops();

}  // namespace emopt::cpu
