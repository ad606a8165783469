// The launches of rules whose kernels are compiled at run time, on the host.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "engine/cuda/erased_rule.h"
#include "engine/cuda/launch.h"
#include "engine/cuda/padded_rule.h"
#include "run_on_host.h"

// The launch that a kernel of `Rule` sees, and the host fills without the rule's type.
template <class Rule, class Erased>
struct LaunchInKernel;

template <class Rule, int kStates, uint32_t kSlots, class Epilogue, class Real, size_t kBytes,
          bool kHasCodes>
struct LaunchInKernel<Rule, emopt::cuda::Launch<emopt::cuda::ErasedRule<kStates, kSlots>, Epilogue,
                                                Real, kBytes, kHasCodes>> {
  using Type =
      emopt::cuda::Launch<emopt::cuda::PaddedRule<Rule>, Epilogue, Real, kBytes, kHasCodes>;
};

template <class Rule, int kStates, uint32_t kSlots>
struct LaunchInKernel<Rule, emopt::cuda::AdvanceScalars<emopt::cuda::ErasedRule<kStates, kSlots>>> {
  using Type = emopt::cuda::AdvanceScalars<emopt::cuda::PaddedRule<Rule>>;
};

// A kernel's arguments, with which the host has filled a launch.
template <class Rule, class Erased>
struct KernelArguments {
  using Launch = typename LaunchInKernel<Rule, Erased>::Type;
  static_assert(sizeof(Launch) == sizeof(Erased) && alignof(Launch) == alignof(Erased));
  static_assert(Launch::kCapacity == Erased::kCapacity);
  static_assert(std::is_trivially_copyable_v<Launch> && std::is_trivially_copyable_v<Erased>);

  alignas(Launch) unsigned char bytes[sizeof(Launch)];

  explicit KernelArguments(const Erased& launch) { std::memcpy(bytes, &launch, sizeof(bytes)); }

  const Launch& get() const { return *reinterpret_cast<const Launch*>(bytes); }
};

// Runs the kernel of `Rule` on the host. That of `AdvanceScalars` has one block.
template <class Rule, class Erased, class... NumBlocks>
void run_on_host_as(const Erased& launch, NumBlocks... num_blocks) {
  run_on_host(KernelArguments<Rule, Erased>(launch).get(), num_blocks...);
}
