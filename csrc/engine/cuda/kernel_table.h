// The kernels of a rule that are compiled at run time, as far as they are loaded. Independent of
// CUDA's headers.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../rule_info.h"

namespace emopt::cuda {

// One of a rule's kernels.
struct KernelKey {
  int epilogue;   // by Epilogue::kIndex; kNumEpilogues: the kernel that advances scalar states
  int precision;  // by kPrecision<Real>
  bool is_large;
  bool needs_setup;
  bool has_codes = false;  // ApplyUpdate in float32, which needs a setup

  static constexpr KernelKey advance() { return {kNumEpilogues, 0, false, false}; }
  static constexpr KernelKey codes(bool is_large) {
    return {ApplyUpdate::kIndex, kPrecision<float>, is_large, true, true};
  }

  static constexpr size_t kCodes = size_t{kNumEpilogues} * kNumPrecisions * 4 + 1;
  static constexpr size_t kCount = kCodes + 2;

  constexpr size_t index() const {
    if (has_codes) return kCodes + is_large;
    const int index = ((epilogue * kNumPrecisions + precision) * 2 + is_large) * 2 + needs_setup;
    return static_cast<size_t>(index);
  }
  static constexpr KernelKey at(size_t index) {
    if (index >= kCodes) return codes(index != kCodes);
    return {static_cast<int>(index / (4 * kNumPrecisions)),
            static_cast<int>(index / 4 % kNumPrecisions), (index & 2) != 0, (index & 1) != 0};
  }
};

// Any thread may read while another one adds kernels, which are never removed: what a call finds
// before it modifies anything is there when it launches.
class KernelTable {
 public:
  // Null if it is not loaded.
  void* find(int8_t device, KernelKey key) const {
    return devices_[place_of(device)].kernels[key.index()].load(std::memory_order_acquire);
  }

  // Whether a kernel is loaded; otherwise notes that it is wanted.
  bool has(int8_t device, KernelKey key) {
    if (find(device, key) != nullptr) return true;
    devices_[place_of(device)].wanted.fetch_or(1u << key.index(), std::memory_order_relaxed);
    return false;
  }

  void add(int8_t device, KernelKey key, void* kernel) {
    devices_[place_of(device)].kernels[key.index()].store(kernel, std::memory_order_release);
  }

  // Whether large launches can take the place of all small ones.
  bool has_large(int8_t device, KernelKey key) const {
    for (const bool needs_setup : {false, true}) {
      key.needs_setup = needs_setup;
      key.is_large = false;
      const bool has_small = find(device, key) != nullptr;
      key.is_large = true;
      if (has_small && find(device, key) == nullptr) return false;
    }
    return true;
  }

  struct Wanted {
    int8_t device;
    KernelKey key;
  };

  // The kernels that were wanted since the last call.
  std::vector<Wanted> take_wanted() {
    std::vector<Wanted> result;
    for (size_t device = 0; device < devices_.size(); ++device) {
      const uint32_t wanted = devices_[device].wanted.exchange(0, std::memory_order_relaxed);
      for (size_t i = 0; wanted != 0 && i < KernelKey::kCount; ++i) {
        if ((wanted >> i & 1) != 0) {
          result.push_back({static_cast<int8_t>(device), KernelKey::at(i)});
        }
      }
    }
    return result;
  }

 private:
  struct Device {
    std::array<std::atomic<void*>, KernelKey::kCount> kernels{};
    std::atomic<uint32_t> wanted{0};
  };
  static_assert(KernelKey::kCount <= 32);

  static size_t place_of(int8_t device) { return static_cast<uint8_t>(device) % kMaxDevices; }

  static constexpr size_t kMaxDevices = 128;  // those that an int8_t can name
  std::array<Device, kMaxDevices> devices_{};
};

}  // namespace emopt::cuda
