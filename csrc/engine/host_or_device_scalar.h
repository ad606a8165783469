// A scalar of a step: a value on the host, or an address in a CUDA device's memory, which the host
// does not read.
#pragma once

#include "../rules/rule.h"

namespace emopt {

struct HostOrDeviceScalar {
  enum class Type : uint8_t { kFloat32, kFloat64, kInt64 };

  double value = 0.0;             // if `address` is null
  const void* address = nullptr;  // in a device's memory
  Type type = Type::kFloat32;     // of the scalar at `address`

  EMOPT_FN bool is_on_device() const { return address != nullptr; }

  // On the host, call this only if `address` is null.
  EMOPT_FN double read() const {
    if (address == nullptr) return value;
    if (type == Type::kInt64) return static_cast<double>(*static_cast<const int64_t*>(address));
    if (type == Type::kFloat64) return *static_cast<const double*>(address);
    return static_cast<double>(*static_cast<const float*>(address));
  }
};

}  // namespace emopt
