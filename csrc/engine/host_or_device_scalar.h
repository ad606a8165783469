// A number that a step depends on: known to the host, or in a CUDA device's memory, where the host
// does not look.
#pragma once

#include "../rules/rule.h"

namespace emopt {

struct HostOrDeviceScalar {
  enum class Type : uint8_t { kFloat32, kFloat64, kInt64 };

  double value = 0.0;             // where the host knows it
  const void* address = nullptr;  // where it does not
  Type type = Type::kFloat32;     // of what is there

  EMOPT_FN bool is_on_device() const { return address != nullptr; }

  // On the host only for numbers that it knows.
  EMOPT_FN double read() const {
    if (address == nullptr) return value;
    if (type == Type::kInt64) return static_cast<double>(*static_cast<const int64_t*>(address));
    if (type == Type::kFloat64) return *static_cast<const double*>(address);
    return static_cast<double>(*static_cast<const float*>(address));
  }
};

}  // namespace emopt
