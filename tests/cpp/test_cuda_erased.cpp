// Rules whose kernels are compiled at run time: the host plans launches without the rule's type,
// and the kernel, which has it, updates the same elements as a reference. Scalars "on the device"
// are in the host's memory.
#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "cases.h"
#include "check.h"
#include "engine/rule_unit.h"
#include "launches.h"
#include "padded_launch.h"
#include "plugin_rules.h"

using namespace emopt;

namespace {

// What the host uses of a rule without its type.
template <class Rule>
RuleInstance erased(const Rule& rule) {
  using Float = typename Rule::template Step<float>;
  using Double = typename Rule::template Step<double>;
  static const RuleInfo info = [] {
    RuleInfo result{};
    result.make_constants[0] = &unit::make_constants<Rule, float>;
    result.make_constants[1] = &unit::make_constants<Rule, double>;
    result.keeps_weight[0] = unit::keeps_weight_of<Float>();
    result.keeps_weight[1] = unit::keeps_weight_of<Double>();
    return result;
  }();
  RuleInstance instance{&info, {}};
  std::memcpy(instance.bytes, &rule, sizeof(rule));
  return instance;
}

template <class Rule, class Epilogue>
void sweep(const Rule& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
           const Table<kNumOperandsOf<Rule, Epilogue>>& table) {
  const cuda::ErasedRule<kNumStates<Rule>, 0> without_type(erased(rule));
  const auto run = [](int8_t, const auto& launch, auto... num_blocks) {
    if constexpr (sizeof...(num_blocks) == 0) {
      run_on_host(launch);
    } else if constexpr (sizeof(launch) <= cuda::kSmallLaunch) {
      run_on_host_as<Rule>(launch, num_blocks...);
    } else {
      CHECK(!"the same code once more, for more rows than there are here");
    }
  };
  for_each_launch(without_type, step, epilogue, table, {2, true}, run);
}

// Rows with a master weight, with a split master, without a master.
template <class Epilogue, class Rule>
void check(const Rule& rule, std::mt19937_64& random) {
  auto epilogue = random_epilogue<Epilogue>(random);
  Rows<Rule, Epilogue> rows;
  float counters[4] = {0.0F, 1.0F, 4.0F, 19.0F};
  const DType uniform = one_of(kTypes, random);
  const bool is_uniform = random() % 2 == 0;
  for (float& counter : counters) {
    const auto numel = static_cast<int64_t>(random() % (2 * cuda::kTile));
    const size_t count = random_num_operands<Rule, Epilogue>(random);
    std::vector<Buffer> operands;
    const size_t before = random() % 5;
    for (size_t k = 0; k < count; ++k) {
      operands.emplace_back(is_uniform ? uniform : one_of(kTypes, random), numel, before, random);
    }
    const bool is_wide =
        std::any_of(operands.begin() + kGrad, operands.end(),
                    [](const auto& each) { return each.dtype == DType::kFloat64; });
    if (count == num_with_master<Rule, Epilogue>() && !is_wide) split(operands, random);
    const bool has_counter = Epilogue::kHasRowSteps && random() % 2 == 0;
    const double step = has_counter ? static_cast<double>(counter + 1.0F) : 3.0;
    rows.add(std::move(operands), rule, step, epilogue, 0, has_counter ? &counter : nullptr);
  }
  const int64_t third = 3;
  const HostOrDeviceScalar steps[] = {{3.0}, {0.0, &third, HostOrDeviceScalar::Type::kInt64}};
  double lr = 0.0;
  if constexpr (Epilogue::kHasRowSteps) {
    lr = epilogue.lr.value;
    if (random() % 2 == 0) epilogue.lr = {0.0, &lr, HostOrDeviceScalar::Type::kFloat64};
  }
  sweep(rule, one_of(steps, random), epilogue, rows.table);
  rows.check();
}

template <class Rule>
void check_rule(const Rule& rule) {
  std::mt19937_64 random(0);
  for (int round = 0; round < 12; ++round) {
    check<StoreUpdate>(rule, random);
    check<ApplyUpdate>(rule, random);
  }
}

}  // namespace

int main() {
  check_rule(SignDescent{0.5});
  check_rule(FiveMomenta{{0.9, 0.8, 0.7, 0.6, 0.5}});
  for (const auto& rule : patient_rules()) check_rule(rule);
  std::mt19937_64 random(1);
  const PatientDescent waiting = patient_rules().front();
  for (int round = 0; round < 5; ++round) {
    check_kept_weights(waiting, random_epilogue<ApplyUpdate>(random), 0, random,
                       [](const PatientDescent& rule, double step, const ApplyUpdate& epilogue,
                          const auto& table) { sweep(rule, {step}, epilogue, table); });
  }
}
