// Compares the kernel's results with the reference in tests/cpp/buffers.h: they must be
// bit-identical, except for NaNs, and nothing else may have changed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "buffers.h"
#include "device.h"

namespace driver {

// Puts special values into an operand, or their magnitudes into a second moment.
inline void put_specials(Buffer& buffer, int k, std::mt19937_64& random) {
  constexpr double kSpecials[] = {HUGE_VAL, -HUGE_VAL, NAN,     0.0,     -0.0,      1e-45, -1e-40,
                                  65504.0,  65519.0,   65520.0, 3.38e38, 3.4e38,    -1e30, 5.9e-8,
                                  3e-8,     -2.9e-8,   6.1e-5,  6.2e-5,  1.00390625};
  for (int64_t i = static_cast<int64_t>(random() % 8); i < buffer.numel();
       i += 1 + static_cast<int64_t>(random() % 16)) {
    const double special = kSpecials[random() % std::size(kSpecials)];
    buffer.put(i, k == kFirstState + 1 ? std::fabs(special) : special);
  }
}

struct Element {
  size_t row;
  int64_t index;
};

// Replaces NaNs by the expected ones; returns the first wrong element.
inline std::optional<Element> compare(std::vector<std::vector<Buffer>>& got,
                                      const std::vector<std::vector<Buffer>>& wanted) {
  std::optional<Element> wrong;
  for (size_t r = 0; r < wanted.size(); ++r) {
    for (size_t k = 0; k < wanted[r].size(); ++k) {
      Buffer& buffer = got[r][k];
      const Buffer& right = wanted[r][k];
      const size_t size = static_cast<size_t>(size_of(right.dtype));
      const bool is_split = right.dtype == DType::kSplitParam || right.dtype == DType::kRemainder;
      for (size_t at = right.offset; at < right.bytes.size(); at += size) {
        if (std::memcmp(&buffer.bytes[at], &right.bytes[at], size) == 0) continue;
        const auto i = static_cast<int64_t>((at - right.offset) / size);
        const auto is_nan = [&](const std::vector<Buffer>& row) {
          return is_split ? std::isnan(joined(row[kUpdate].bits(i), row.back().bits(i)))
                          : std::isnan(row[k].get(i));
        };
        if (is_nan(got[r]) && is_nan(wanted[r])) continue;
        if (!wrong) wrong = Element{r, i};
      }
    }
  }
  return wrong;
}

// The error of a step; "" if it is correct.
template <class Epilogue>
std::string fault(Device& device, const cuda::Chip& chip, const Mix& mix, Scalars scalars,
                  const std::vector<int64_t>& numels, bool is_skipped) {
  constexpr int kOperands = kNumOperandsOf<Epilogue>;
  const int num_buffers = kOperands - (Epilogue::kOperands != 0 && !mix.has_master ? 1 : 0);
  std::mt19937_64 random(numels.size());
  std::vector<unsigned char> image(sizeof(DeviceScalars) + numels.size() * sizeof(float));
  DeviceScalars values;
  values.found_inf = is_skipped ? 1.0f : 0.0f;
  std::memcpy(image.data(), &values, sizeof(values));
  const auto* const on_device = reinterpret_cast<const DeviceScalars*>(device.memory);
  const auto counter_at = [](size_t r) { return sizeof(DeviceScalars) + r * sizeof(float); };
  std::vector<std::vector<Buffer>> operands, wanted;
  std::vector<std::vector<size_t>> places;
  Table<kOperands> table;
  for (size_t r = 0; r < numels.size(); ++r) {
    std::vector<Buffer> row_operands;
    std::vector<size_t> row_places;
    for (int k = 0; k < num_buffers; ++k) {
      const auto first = static_cast<size_t>(first_element(static_cast<Offsets>(r % 3), k));
      const bool is_split = mix.is_split() && (k == kUpdate || k == kOperands - 1);
      row_operands.emplace_back(is_split ? kBF16 : mix.dtype(k), numels[r], first, random);
      put_specials(row_operands.back(), k, random);
    }
    if (mix.is_split()) split(row_operands, random);
    auto row = row_of<kOperands>(row_operands, r % 2 == 0 ? 1.0 : 0.375);
    row.device = 0;
    row.position = r;
    row.first_index = r << 31;
    for (size_t k = 0; k < kOperands; ++k) {
      if (k < row_operands.size()) {
        row_places.push_back((image.size() / 256 + 1) * 256);
        image.resize(row_places[k] + row_operands[k].bytes.size() + 64);
        row.data[k] = device.memory + row_places[k] + row_operands[k].offset;
      } else {
        row.data[k] = row.data[kUpdate];
      }
    }
    if (scalars == Scalars::kCounters) {
      const float done = kStep - 1.0f;
      std::memcpy(&image[counter_at(r)], &done, sizeof(done));
      row.step = reinterpret_cast<float*>(device.memory + counter_at(r));
    }
    operands.push_back(row_operands);
    wanted.push_back(row_operands);
    places.push_back(row_places);
    if (!is_skipped) {
      apply_by_hand(kRule, kStep, epilogue_of<Epilogue>(mix, nullptr), row, wanted.back());
    }
    table.append(row);
  }
  if (image.size() > device.bytes) return "no memory";
  const auto put_into = [&](std::vector<unsigned char>& to, auto& rows) {
    for (size_t r = 0; r < rows.size(); ++r) {
      for (size_t k = 0; k < rows[r].size(); ++k) {
        const auto& bytes = rows[r][k].bytes;
        std::copy(bytes.begin(), bytes.end(), to.begin() + static_cast<ptrdiff_t>(places[r][k]));
      }
    }
  };
  put_into(image, operands);
  device.copy(device.memory, image.data(), image.size(), cudaMemcpyHostToDevice);
  const auto* const address = scalars == Scalars::kHost ? nullptr : on_device;
  step_on_device(device, chip, step_of(address), epilogue_of<Epilogue>(mix, address), table);
  std::vector<unsigned char> after(image.size());
  device.copy(after.data(), device.memory, after.size(), cudaMemcpyDeviceToHost);

  for (size_t r = 0; r < operands.size(); ++r) {
    for (size_t k = 0; k < operands[r].size(); ++k) {
      auto& bytes = operands[r][k].bytes;
      std::copy_n(after.begin() + static_cast<ptrdiff_t>(places[r][k]), bytes.size(),
                  bytes.begin());
    }
    const float done = kStep - (is_skipped ? 1.0f : 0.0f);
    if (scalars == Scalars::kCounters) std::memcpy(&image[counter_at(r)], &done, sizeof(done));
  }
  if (const auto wrong = compare(operands, wanted)) {
    return "element " + std::to_string(wrong->index) + " of tensor " + std::to_string(wrong->row) +
           ", of " + std::to_string(numels[wrong->row]);
  }
  put_into(image, wanted);
  put_into(after, wanted);
  return image == after ? "" : "memory around the operands, or a counter";
}

template <class Epilogue>
bool is_right(Device& device, const Mix& mix, Scalars scalars) {
  // Few tensors, and enough for a large launch; chunks of one tile, and of several.
  constexpr int64_t kTile = cuda::kTile;
  const std::vector<int64_t> few = {1, 7, 1021, kTile, 3 * kTile + 5, 17 * kTile + 9};
  std::vector<int64_t> many;
  for (int64_t r = 0; r < 500; ++r) many.push_back(r % 23);
  const cuda::Chip small_chip{1, true};
  std::string wrong = fault<Epilogue>(device, device.chip, mix, scalars, few, false);
  if (wrong.empty()) wrong = fault<Epilogue>(device, small_chip, mix, scalars, few, false);
  if (wrong.empty()) wrong = fault<Epilogue>(device, device.chip, mix, scalars, many, false);
  if (wrong.empty() && Epilogue::kHasRowSteps && scalars != Scalars::kHost) {
    wrong = fault<Epilogue>(device, device.chip, mix, scalars, few, true);
  }
  std::printf("{\"check\": \"%s/%s%s%s\", \"wrong\": \"%s\"}\n",
              Epilogue::kOperands != 0 ? "apply" : "store", mix.name,
              scalars == Scalars::kHost ? "" : "/", kScalarsNames[static_cast<int>(scalars)],
              wrong.c_str());
  std::fflush(stdout);
  return wrong.empty();
}

inline bool all_right(Device& device) {
  bool right = true;
  for (const Mix& mix : kMixes) {
    for (const Scalars scalars : {Scalars::kHost, Scalars::kDevice, Scalars::kCounters}) {
      right &= is_right<ApplyUpdate>(device, mix, scalars);
      if (!fits<StoreUpdate>(mix) || scalars == Scalars::kCounters) continue;
      right &= is_right<StoreUpdate>(device, mix, scalars);
    }
  }
  return right;
}

}  // namespace driver
