// The cases that the driver checks and times: Adam with mixes of dtypes, shapes and scalars.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/operands.h"
#include "rules/adam.h"

namespace driver {

using namespace emopt;

// ---- dtypes -------------------------------------------------------------------------------------

struct Mix {
  const char* name;
  DType param, grad, state;
  bool has_master = false;
  DType master = DType::kFloat32;
  bool is_stochastic = false;

  // The dtype of operand k. Without a master weight, the weight has the parameter's dtype.
  DType dtype(int k) const {
    if (k == kUpdate) return param;
    if (k == kGrad) return grad;
    if (k < kFirstState + kNumStates<Adam>) return state;
    return has_master ? master : param;
  }
  bool is_split() const { return param == DType::kSplitParam; }
};

template <class Epilogue>
inline constexpr int kNumOperandsOf = kNumOperands<kNumStates<Adam>, Epilogue>;

inline constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBF16 = DType::kBFloat16,
                       kF16 = DType::kFloat16;
inline constexpr Mix kMixes[] = {
    {"float32", kF32, kF32, kF32},
    {"bfloat16+float32", kBF16, kBF16, kF32},  // parameters and gradients + states
    {"float16+float32", kF16, kF16, kF32},
    {"bfloat16", kBF16, kBF16, kBF16},
    {"float16", kF16, kF16, kF16},
    {"master", kBF16, kBF16, kF32, true},
    {"remainder", DType::kSplitParam, kBF16, kF32, true, DType::kRemainder},
    {"stochastic", kBF16, kBF16, kBF16, false, kF32, true},
    {"float64", kF64, kF64, kF64},
};

template <class Epilogue>
bool fits(const Mix& mix) {  // updates have no master weights and no stochastic rounding
  return Epilogue::kOperands != 0 || (!mix.has_master && !mix.is_stochastic);
}

// The bytes that a step reads and writes per element.
template <class Epilogue>
int64_t bytes_of_element(const Mix& mix) {
  const int64_t states = kNumStates<Adam>;
  int64_t bytes = size_of(mix.grad) + 2 * states * size_of(mix.state) + size_of(mix.param);
  if (Epilogue::kOperands != 0) {
    bytes += mix.has_master ? 2 * size_of(mix.master) : size_of(mix.param);
    if (mix.is_split()) bytes += size_of(mix.param);  // also read
  }
  return bytes;
}

// ---- scalars ------------------------------------------------------------------------------------

// Scalars on the host; on the device, as for capturable optimizers; on the device, with a step
// counter for each row.
enum class Scalars { kHost, kDevice, kCounters };
inline constexpr const char* kScalarsNames[] = {"", "device", "counters"};

// Values that float32 holds exactly.
inline constexpr float kLr = 0.0009765625f, kGradScale = 4.0f, kStep = 1000.0f;
// The same scalars in the device's memory.
struct DeviceScalars {
  float lr = kLr, grad_scale = kGradScale, found_inf = 0.0f, step = kStep;
};

template <class Epilogue>
Epilogue epilogue_of(const Mix& mix, const DeviceScalars* on_device) {
  Epilogue epilogue;
  if constexpr (Epilogue::kHasRowSteps) {
    epilogue.lr = {kLr};
    epilogue.grad_scale = {kGradScale};
    epilogue.weight_decay = 0.125;
    epilogue.is_stochastic = mix.is_stochastic;
    epilogue.seed = 7;
    if (on_device != nullptr) {
      epilogue.lr.address = &on_device->lr;
      epilogue.grad_scale.address = &on_device->grad_scale;
      epilogue.found_inf.address = &on_device->found_inf;
    }
  }
  return epilogue;
}

inline HostOrDeviceScalar step_of(const DeviceScalars* on_device) {
  return {kStep, on_device == nullptr ? nullptr : &on_device->step};
}

inline const Adam kRule{{0.9, 0.999}, true, false, 1e-8};

// ---- timed cases --------------------------------------------------------------------------------

// Operands start at their buffers' first elements, all at the second, or each at a different one.
enum class Offsets { kNone, kSame, kDifferent };

inline int64_t first_element(Offsets offsets, int k) {
  return offsets == Offsets::kNone ? 0 : offsets == Offsets::kSame ? 1 : k + 1;
}

struct Case {
  std::string name;
  bool applies;
  Mix mix;
  std::vector<int64_t> numels;
  Scalars scalars = Scalars::kHost;
  Offsets offsets = Offsets::kNone;
};

// GPT-2 small: 148 tensors, 124 million elements.
inline std::vector<int64_t> gpt2() {
  constexpr int64_t kWidth = 768;
  std::vector<int64_t> numels{50257 * kWidth, 1024 * kWidth};
  for (int layer = 0; layer < 12; ++layer) {
    for (const int64_t rows : {1, 1, 3 * 768, 3, 768, 1, 1, 1, 4 * 768, 4, 4 * 768, 1}) {
      numels.push_back(rows * kWidth);
    }
  }
  numels.insert(numels.end(), 2, kWidth);
  return numels;
}

inline std::vector<int64_t> numels_of(const std::string& shape) {
  if (shape == "gpt2") return gpt2();
  const auto x = shape.find('x');
  if (x != std::string::npos) {
    return std::vector<int64_t>(std::stoul(shape), std::stol(shape.substr(x + 1)));
  }
  return {std::stol(shape) << (shape.back() == 'K' ? 10 : 20)};
}

// Limits the elements of operands and the length of lists to `largest`, for a smoke test.
inline std::vector<Case> all_cases(int64_t largest) {
  std::vector<Case> cases;
  const auto add = [&](bool applies, const char* mix_name, const std::vector<const char*>& shapes,
                       Scalars scalars = Scalars::kHost, Offsets offsets = Offsets::kNone) {
    const Mix* const mix = std::find_if(std::begin(kMixes), std::end(kMixes), [&](const Mix& m) {
      return std::string(m.name) == mix_name;
    });
    for (const std::string shape : shapes) {
      Case c{std::string(applies ? "apply/" : "store/") + mix_name + "/" + shape,
             applies,
             *mix,
             numels_of(shape),
             scalars,
             offsets};
      if (scalars != Scalars::kHost) {
        c.name += std::string("/") + kScalarsNames[static_cast<int>(scalars)];
      }
      if (offsets != Offsets::kNone) c.name += offsets == Offsets::kSame ? "/odd" : "/apart";
      if (largest < static_cast<int64_t>(c.numels.size())) c.numels.resize(largest);
      for (int64_t& numel : c.numels) numel = std::min(numel, largest);
      cases.push_back(std::move(c));
    }
  };
  add(true, "float32",
      {"64K", "256K", "1M", "4M", "16M", "64M", "256M", "1000x1000", "1000x8", "gpt2"});
  add(true, "bfloat16+float32", {"1M", "64M", "1000x1000", "gpt2"});
  for (const char* const mix :
       {"float16+float32", "bfloat16", "float16", "master", "remainder", "stochastic", "float64"}) {
    add(true, mix, {"1M", "64M"});
  }
  add(true, "float32", {"64K", "1M", "64M", "1000x1000", "gpt2"}, Scalars::kDevice);
  add(true, "float32", {"1M", "1000x1000", "gpt2"}, Scalars::kCounters);
  add(true, "bfloat16+float32", {"64M"}, Scalars::kDevice);
  for (const Offsets offsets : {Offsets::kSame, Offsets::kDifferent}) {
    add(true, "float32", {"64M"}, Scalars::kHost, offsets);
    add(true, "bfloat16+float32", {"64M"}, Scalars::kHost, offsets);
  }
  add(false, "float32", {"1M", "64M", "256M", "1000x1000", "gpt2"});
  add(false, "float32", {"1M"}, Scalars::kDevice);
  for (const char* const mix : {"bfloat16+float32", "bfloat16", "float16", "float64"}) {
    add(false, mix, {"64M"});
  }
  return cases;
}

}  // namespace driver
