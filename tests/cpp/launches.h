// The launches that the CUDA engine plans for a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "check.h"
#include "engine/cuda/plan.h"

// Calls `run(device, launch, num_blocks)` for each launch and `run(device, counters)` for each
// `Advance`, then `run_scalars(device, rows)` for the rows with scalar states of each device. Every
// device is a `chip`.
template <class Rule, class Epilogue, class Table, class Run, class RunScalars>
void for_each_launch(const Rule& rule, const emopt::HostOrDeviceScalar& step,
                     const Epilogue& epilogue, const Table& table, const emopt::cuda::Chip& chip,
                     Run run, RunScalars run_scalars) {
  using namespace emopt::cuda;
  const auto enqueue_key = [&](const auto& row, const void* const* rows, size_t num_rows) {
    const auto enqueue = [&](const auto& launch, uint32_t num_blocks) {
      run(row.device, launch, num_blocks);
      return true;
    };
    if (row.has_codes()) {
      if constexpr (emopt::kMayHaveCodes<Rule> && Epilogue::kOperands != 0) {
        plan_rows<Rule, Epilogue, float, true>(rule, step, epilogue, rows, num_rows, chip, enqueue);
      } else {
        CHECK(!"no state may be stored as codes");
      }
    } else if (row.compute == emopt::DType::kFloat64) {
      plan_rows<Rule, Epilogue, double>(rule, step, epilogue, rows, num_rows, chip, enqueue);
    } else {
      plan_rows<Rule, Epilogue, float>(rule, step, epilogue, rows, num_rows, chip, enqueue);
    }
  };
  sweep_table(epilogue, table, enqueue_key, run, run_scalars);
}

// The same of a table without scalar states.
template <class Rule, class Epilogue, class Table, class Run>
void for_each_launch(const Rule& rule, const emopt::HostOrDeviceScalar& step,
                     const Epilogue& epilogue, const Table& table, const emopt::cuda::Chip& chip,
                     Run run) {
  for_each_launch(rule, step, epilogue, table, chip, run,
                  [](int8_t, const auto&) { CHECK(!"no row has scalar states"); });
}
