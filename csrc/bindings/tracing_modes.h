// Modes under which native code computes nothing.
#pragma once

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <array>

namespace emopt {

// Whether an active mode must see each PyTorch operation. Under a FakeTensorMode, for example,
// nothing may be computed.
inline bool is_seen_by_tracer() {
  using c10::impl::TorchDispatchModeKey;
  using c10::impl::TorchDispatchModeTLS;
  if (!TorchDispatchModeTLS::any_modes_set()) return false;
  constexpr std::array kKeys = {TorchDispatchModeKey::FAKE, TorchDispatchModeKey::PROXY,
                                TorchDispatchModeKey::FUNCTIONAL};
  return std::any_of(kKeys.begin(), kKeys.end(), [](TorchDispatchModeKey key) {
    return TorchDispatchModeTLS::get_mode(key).has_value();
  });
}

}  // namespace emopt
