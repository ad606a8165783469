// Checks and times the CUDA kernel without torch, in one process. drive.py compiles it, with nvcc
// or (with host_device.h) for the host, once for each variant of tuning.h's constants.
//
//   driver [--smoke] [--budget SECONDS] [TEXT...]
//
// It first checks each mix of dtypes (correctness.h), then times copies as the upper bound, then
// each case whose name contains one of the texts. A case's sweeps are captured in a graph that is
// replayed back to back, so that the device never waits for the host. Sweeps cycle through several
// sets of operands, so that none finds its operands in the L2 cache.
//
// Writes one JSON object per line. --smoke uses small tensors and few rounds. Exit status: 0; 2 for
// a CUDA error; 3 if a result is wrong, in which case nothing is timed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "correctness.h"
#include "device.h"
#include "workload.h"

namespace driver {

namespace {

// ---- kernels that fill memory -------------------------------------------------------------------

struct Nothing {
  EMOPT_FN void operator()(uint64_t) const {}
};

// A warp's vectors are contiguous, and each thread has four in flight.
struct Copy {
  struct alignas(16) Vector {
    uint32_t words[4];
  };
  const Vector* from;
  Vector* to;

  EMOPT_FN void operator()(uint64_t thread) const {
    const uint64_t first = thread / 256 * 1024 + thread % 256;
    Vector held[4];
    EMOPT_UNROLL
    for (int i = 0; i < 4; ++i) held[i] = from[first + static_cast<uint64_t>(i) * 256];
    EMOPT_UNROLL
    for (int i = 0; i < 4; ++i) to[first + static_cast<uint64_t>(i) * 256] = held[i];
  }
};

// Fills with numbers from 0 to 1. Split masters are not NaN.
struct Fill {
  char* data;
  DType dtype;

  EMOPT_FN void operator()(uint64_t i) const {
    const auto bits = static_cast<uint32_t>(mix(i));
    const float number = static_cast<float>(bits >> 8) * (1.0f / 16777216.0f);
    if (dtype == DType::kFloat32) reinterpret_cast<float*>(data)[i] = number;
    if (dtype == DType::kFloat64) reinterpret_cast<double*>(data)[i] = number;
    const auto put = [&](uint16_t value) { reinterpret_cast<uint16_t*>(data)[i] = value; };
    if (dtype == DType::kFloat16) put(Round<Float16>::from(number).bits);
    if (dtype == DType::kBFloat16) put(Round<BFloat16>::from(number).bits);
    if (dtype == DType::kSplitParam) put(Round<BFloat16>::from(number + 0.5f).bits);
    if (dtype == DType::kRemainder) put(static_cast<uint16_t>(bits));
  }
};

struct FillCounters {  // each in a separate allocation, as in PyTorch
  static constexpr size_t kStride = 512;
  char* data;

  EMOPT_FN void operator()(uint64_t i) const {
    *reinterpret_cast<float*>(data + i * kStride) = kStep;
  }
};

// ---- timing -------------------------------------------------------------------------------------

struct Effort {
  double seconds = 0.05;  // per case
  int most_sweeps = 512;  // per graph
  double fewest_rounds = 5;
};

struct Times {
  double median, min, max;
};

// The device's seconds per call of `enqueue(i)`, for `count` calls.
template <class Enqueue>
Times time(Device& device, const Effort& effort, int count, Enqueue enqueue) {
  enqueue(0);  // loads the kernels, which is not allowed during a capture
  CALL(cudaStreamSynchronize(device.stream));
  cudaGraph_t graph{};
  cudaGraphExec_t replay{};
  CALL(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < count; ++i) enqueue(i);
  CALL(cudaStreamEndCapture(device.stream, &graph));
  CALL(cudaGraphInstantiate(&replay, graph, 0));
  static std::vector<cudaEvent_t> events;
  const auto seconds_of = [&](int rounds) {
    while (events.size() <= static_cast<size_t>(rounds)) {
      events.emplace_back();
      CALL(cudaEventCreate(&events.back()));
    }
    // These keep the device busy while the host enqueues the rest.
    for (int i = 0; i < 2; ++i) CALL(cudaGraphLaunch(replay, device.stream));
    CALL(cudaEventRecord(events[0], device.stream));
    for (int i = 1; i <= rounds; ++i) {
      CALL(cudaGraphLaunch(replay, device.stream));
      CALL(cudaEventRecord(events[static_cast<size_t>(i)], device.stream));
    }
    CALL(cudaStreamSynchronize(device.stream));
    std::vector<double> seconds;
    for (size_t i = 1; i <= static_cast<size_t>(rounds); ++i) {
      float milliseconds = 0;
      CALL(cudaEventElapsedTime(&milliseconds, events[i - 1], events[i]));
      seconds.push_back(static_cast<double>(milliseconds) * 1e-3 / count);
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds;
  };
  const double once = seconds_of(1)[0] * count;
  const auto seconds =
      seconds_of(static_cast<int>(std::clamp(effort.seconds / once, effort.fewest_rounds, 31.0)));
  CALL(cudaGraphExecDestroy(replay));
  CALL(cudaGraphDestroy(graph));
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

void report(const Device& device, const std::string& name, double bytes, int sweeps, int launches,
            const Times& times) {
  const double rate = bytes / times.median;
  std::printf(
      "{\"name\": \"%s\", \"bytes\": %.0f, \"sweeps\": %d, \"launches\": %d, \"seconds\": %.9g, "
      "\"min\": %.9g, \"max\": %.9g, \"gigabytes_per_second\": %.1f, \"part_of_copy\": %.4f}\n",
      name.c_str(), bytes, sweeps, launches, times.median, times.min, times.max, rate * 1e-9,
      rate / device.copy_rate);
  std::fflush(stdout);
}

// The faster of a kernel and the driver's copy.
void time_copies(Device& device, const Effort& effort, const char* suffix) {
  const size_t half = std::min(device.bytes / 2, size_t{1} << 30) / 16384 * 16384;
  char* const to = device.memory + half;
  CALL(for_each(Fill{device.memory, kF32}, half / sizeof(float), device.stream));
  const auto* const from = reinterpret_cast<const Copy::Vector*>(device.memory);
  const Copy copy{from, reinterpret_cast<Copy::Vector*>(to)};
  const Times by_kernel = time(device, effort, 2, [&](int) {
    CALL(for_each(copy, half / sizeof(Copy::Vector) / 4, device.stream));
  });
  const Times by_driver = time(device, effort, 2, [&](int) {
    CALL(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, device.stream));
  });
  const double bytes = 2.0 * static_cast<double>(half);
  if (std::strcmp(suffix, "/last") != 0)
    device.copy_rate = bytes / std::min(by_kernel.median, by_driver.median);
  report(device, std::string("copy/kernel") + suffix, bytes, 2, 1, by_kernel);
  report(device, std::string("copy/driver") + suffix, bytes, 2, 1, by_driver);
}

// A set of operands in the device's memory. Each tensor starts at a multiple of 512 bytes, as in
// PyTorch, plus the offset.
template <class Epilogue>
struct Layout {
  static constexpr int kOperands = kNumOperandsOf<Epilogue>;
  static constexpr size_t kAlignment = 512;
  const Case& c;

  int num_buffers() const {
    return kOperands - (Epilogue::kOperands != 0 && !c.mix.has_master ? 1 : 0);
  }
  size_t bytes_of(int k, int64_t numel) const {
    const auto size = static_cast<size_t>(size_of(c.mix.dtype(k)));
    const size_t bytes = (static_cast<size_t>(numel) + 8) * size;
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  size_t bytes() const {
    size_t sum = c.scalars == Scalars::kCounters ? c.numels.size() * FillCounters::kStride : 0;
    for (int k = 0; k < num_buffers(); ++k) {
      for (const int64_t numel : c.numels) sum += bytes_of(k, numel);
    }
    return sum;
  }

  Table<kOperands> fill(char* at, cudaStream_t stream) const {
    std::vector<Row<kOperands>> rows(c.numels.size());
    for (int k = 0; k < num_buffers(); ++k) {
      const DType dtype = c.mix.dtype(k);
      char* const begin = at;
      for (size_t r = 0; r < rows.size(); ++r) {
        rows[r].data[k] = at + first_element(c.offsets, k) * size_of(dtype);
        at += bytes_of(k, c.numels[r]);
      }
      const auto count = static_cast<size_t>(at - begin) / static_cast<size_t>(size_of(dtype));
      CALL(for_each(Fill{begin, dtype}, count, stream));
    }
    Table<kOperands> table;
    for (size_t r = 0; r < rows.size(); ++r) {
      Row<kOperands>& row = rows[r];
      for (int k = 0; k < kOperands; ++k) row.dtype[k] = c.mix.dtype(k);
      for (int k = num_buffers(); k < kOperands; ++k) row.data[k] = row.data[kUpdate];
      row.compute = c.mix.state == kF64 ? kF64 : kF32;
      row.device = 0;
      row.position = r;
      row.scale = 1.0;
      row.numel = c.numels[r];
      if (c.scalars == Scalars::kCounters) {
        row.step = reinterpret_cast<float*>(at + r * FillCounters::kStride);
      }
      table.append(row);
    }
    if (c.scalars == Scalars::kCounters) {
      CALL(for_each(FillCounters{at}, rows.size(), stream));
    }
    return table;
  }
};

template <class Epilogue>
void time_case(Device& device, const Effort& effort, const Case& c) {
  const Layout<Epilogue> layout{c};
  constexpr size_t kScalarsBytes = 512;
  const size_t fitting = (device.bytes - kScalarsBytes) / layout.bytes();
  if (fitting == 0) {
    std::printf("{\"name\": \"%s\", \"skipped\": \"takes %zu MiB, and there are %zu\"}\n",
                c.name.c_str(), layout.bytes() >> 20, device.bytes >> 20);
    return;
  }
  int64_t numel = 0;
  for (const int64_t n : c.numels) numel += n;
  const auto bytes = static_cast<double>(numel * bytes_of_element<Epilogue>(c.mix));
  // Sweeps per graph: enough for a millisecond, and for three times the L2 cache's size to pass
  // before a set of operands is used again.
  const double cold = 3.0 * device.properties.l2CacheSize / bytes;
  const double long_enough = 1e-3 / (2e-6 + bytes / device.copy_rate);
  const int sweeps =
      std::min(effort.most_sweeps, static_cast<int>(std::max({cold, long_enough, 1.0})));
  const size_t sets = std::clamp(static_cast<size_t>(cold) + 1, size_t{1}, fitting);

  const DeviceScalars values;
  device.copy(device.memory, &values, sizeof(values), cudaMemcpyHostToDevice);
  const auto* const scalars =
      c.scalars == Scalars::kHost ? nullptr : reinterpret_cast<const DeviceScalars*>(device.memory);
  std::vector<Table<kNumOperandsOf<Epilogue>>> tables;
  for (size_t i = 0; i < std::min(sets, static_cast<size_t>(sweeps)); ++i) {
    tables.push_back(
        layout.fill(device.memory + kScalarsBytes + i * layout.bytes(), device.stream));
  }
  int launches = 0;
  const Times times = time(device, effort, sweeps, [&](int i) {
    launches =
        step_on_device(device, device.chip, step_of(scalars), epilogue_of<Epilogue>(c.mix, scalars),
                       tables[static_cast<size_t>(i) % tables.size()]);
  });
  report(device, c.name, bytes, sweeps, launches, times);
}

template <class Epilogue>
size_t bytes_of(const Case& c) {
  return Layout<Epilogue>{c}.bytes() + 4096;
}

bool has_any(const std::string& name, const std::vector<std::string>& texts) {
  const auto has = [&](const std::string& text) { return name.find(text) != std::string::npos; };
  return texts.empty() || std::any_of(texts.begin(), texts.end(), has);
}

int run(int argc, char** argv) {
  Effort effort;
  int64_t largest = int64_t{1} << 40;
  std::vector<std::string> texts;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--smoke") == 0) {
      effort = {0.0, 2, 1};
      largest = 3000;
    } else if (std::strcmp(argv[i], "--budget") == 0 && i + 1 < argc) {
      effort.seconds = std::atof(argv[++i]);
    } else {
      texts.emplace_back(argv[i]);
    }
  }
  std::vector<Case> cases;
  size_t bytes = size_t{2} << 30;  // for the copies, and for many sets of small operands
  for (Case& c : all_cases(largest)) {
    if (!has_any(c.name, texts)) continue;
    bytes = std::max(bytes, c.applies ? bytes_of<ApplyUpdate>(c) : bytes_of<StoreUpdate>(c));
    cases.push_back(std::move(c));
  }
  Device device(bytes);
  const auto& chip = device.properties;
  std::printf(
      "{\"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d, "
      "\"l2_bytes\": %d}\n",
      chip.name, chip.major, chip.minor, chip.multiProcessorCount, chip.l2CacheSize);
  if (!all_right(device)) return kWrong;
  time_copies(device, {4 * effort.seconds, 2, effort.fewest_rounds},
              "/first");  // raises the clocks
  time_copies(device, effort, "");
  const Times times = time(device, effort, effort.most_sweeps,
                           [&](int) { CALL(for_each(Nothing{}, 1, device.stream)); });
  report(device, "nothing", 0, effort.most_sweeps, 1, times);
  for (const Case& c : cases) {
    if (c.applies) {
      time_case<ApplyUpdate>(device, effort, c);
    } else {
      time_case<StoreUpdate>(device, effort, c);
    }
  }
  time_copies(device, effort, "/last");
  return 0;
}

}  // namespace

}  // namespace driver

int main(int argc, char** argv) { return driver::run(argc, argv); }
