// Rules whose kernels are compiled at run time: the host plans launches without the rule's type,
// and the kernel, which has it, updates the same elements as a reference. Scalars "on the device"
// are in the host's memory.
#include <algorithm>
#include <cstdint>
#include <list>
#include <optional>
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

template <class Rule>
constexpr uint32_t slots_of() {
  return kNumScalarStates<Rule> != 0 ? kMaxScalarStates : 0;
}

// Advances rows with scalar states.
template <class Rule>
void advance(const Rule& rule, const HostOrDeviceScalar& step, const HostOrDeviceScalar& found_inf,
             const std::vector<RowScalars>& rows) {
  const cuda::ErasedRule<0, kMaxScalarStates> without_type(erased(rule));
  cuda::plan_advance(without_type, step, found_inf, rows.data(), rows.size(),
                     [](const auto& launch) {
                       run_on_host_as<Rule>(launch);
                       return true;
                     });
}

template <class Rule, class Epilogue>
void sweep(const Rule& rule, const HostOrDeviceScalar& step, const Epilogue& epilogue,
           const Table<kNumOperandsOf<Rule, Epilogue>>& table, const cuda::Chip& chip = {2, true}) {
  const cuda::ErasedRule<kNumStates<Rule>, slots_of<Rule>()> without_type(erased(rule));
  const auto run = [](int8_t, const auto& launch, auto... num_blocks) {
    if constexpr (sizeof...(num_blocks) == 0) {
      run_on_host(launch);
    } else if constexpr (sizeof(launch) <= cuda::kSmallLaunch) {
      run_on_host_as<Rule>(launch, num_blocks...);
    } else {
      CHECK(!"the same code once more, for more rows than there are here");
    }
  };
  const auto run_scalars = [&](int8_t, const std::vector<RowScalars>& rows) {
    if constexpr (kNumScalarStates<Rule> != 0 && Epilogue::kHasRowSteps) {
      advance(rule, step, epilogue.found_inf, rows);
    } else {
      CHECK(!"no row has scalar states that a sweep advances");
    }
  };
  for_each_launch(without_type, step, epilogue, table, chip, run, run_scalars);
}

// The operands of a row: with a master weight, with a split master, or without a master.
template <class Rule, class Epilogue>
std::vector<Buffer> random_operands(int64_t numel, std::optional<DType> uniform,
                                    std::mt19937_64& random) {
  const size_t count = random_num_operands<Rule, Epilogue>(random);
  std::vector<Buffer> operands;
  const size_t before = random() % 5;
  for (size_t k = 0; k < count; ++k) {
    operands.emplace_back(uniform ? *uniform : one_of(kTypes, random), numel, before, random);
  }
  const bool is_wide = std::any_of(operands.begin() + kGrad, operands.end(),
                                   [](const auto& each) { return each.dtype == DType::kFloat64; });
  if (count == num_with_master<Rule, Epilogue>() && !is_wide) split(operands, random);
  return operands;
}

std::optional<DType> random_uniform(std::mt19937_64& random) {
  const DType dtype = one_of(kTypes, random);
  return random() % 2 == 0 ? std::optional(dtype) : std::nullopt;
}

template <class Epilogue, class Rule>
void check(const Rule& rule, std::mt19937_64& random) {
  auto epilogue = random_epilogue<Epilogue>(random);
  Rows<Rule, Epilogue> rows;
  float counters[4] = {0.0F, 1.0F, 4.0F, 19.0F};
  const std::optional<DType> uniform = random_uniform(random);
  for (float& counter : counters) {
    const auto numel = static_cast<int64_t>(random() % (2 * cuda::kTile));
    const bool has_counter = Epilogue::kHasRowSteps && random() % 2 == 0;
    const double step = has_counter ? static_cast<double>(counter + 1.0F) : 3.0;
    rows.add(random_operands<Rule, Epilogue>(numel, uniform, random), rule, step, epilogue, 0,
             has_counter ? &counter : nullptr);
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

// A parameter's counter and its scalar states, and those after a step.
template <class Rule>
struct Numbers {
  static constexpr int kCount = kNumScalarStates<Rule>;
  float counter = 0.0F;
  float scalars[kCount] = {};
  RowExtras extras{};
  float next_counter = 0.0F;
  float next[kCount] = {};

  explicit Numbers(std::mt19937_64& random)
      : counter(static_cast<float>(random() % 20)), next_counter(counter) {
    for (int i = 0; i < kCount; ++i) {
      scalars[i] = next[i] = static_cast<float>(random() % 1000) / 1000.0F;
    }
  }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  // On the device, whose memory is the host's here.
  RowScalars on_device(bool has_counter) {
    RowScalars row{has_counter ? &counter : nullptr, {}};
    for (int i = 0; i < kCount; ++i) row.scalars[i] = extras.scalars[i] = scalars + i;
    return row;
  }

  Rule rule_with(Rule rule) const {
    for (int i = 0; i < kCount; ++i) rule.scalars[i] = static_cast<double>(scalars[i]);
    return rule;
  }

  void expect_advance(const Rule& rule, double step, bool has_counter) {
    Rule after = rule_with(rule);
    after.advance(step);
    for (int i = 0; i < kCount; ++i) next[i] = static_cast<float>(after.scalars[i]);
    if (has_counter) next_counter = counter + 1.0F;
  }

  void check() const {
    CHECK(counter == next_counter);
    CHECK(std::equal(scalars, scalars + kCount, next));
  }
};

// Rows whose scalar states are on the device, each with its numbers, between others that use those
// of the rule. A sweep advances the former together with their counters.
template <class Epilogue, class Rule>
void check_scalars(const Rule& rule, size_t num_rows, std::mt19937_64& random) {
  auto epilogue = random_epilogue<Epilogue>(random);
  float found_inf = 0.0F;
  if constexpr (Epilogue::kHasRowSteps) {
    found_inf = random() % 3 == 0 ? 1.0F : 0.0F;
    epilogue.found_inf = {static_cast<double>(found_inf)};
  }
  Rows<Rule, Epilogue> rows;
  std::list<Numbers<Rule>> numbers;
  const std::optional<DType> uniform = random_uniform(random);
  const uint64_t longest = num_rows < 10 ? 2 * cuda::kTile : 5;
  for (size_t r = 0; r < num_rows; ++r) {
    Numbers<Rule>& number = numbers.emplace_back(random);
    const bool is_on_device = random() % 4 != 0;
    const bool has_counter = Epilogue::kHasRowSteps && is_on_device;
    const RowScalars there = number.on_device(has_counter);
    const double step = has_counter ? static_cast<double>(number.counter + 1.0F) : 3.0;
    rows.add(
        random_operands<Rule, Epilogue>(static_cast<int64_t>(random() % longest), uniform, random),
        is_on_device ? number.rule_with(rule) : rule, step, epilogue, 0, there.counter);
    // Without a counter on the device, those of a step are on the host.
    if (is_on_device || Epilogue::kHasRowSteps) rows.table.rows.back().extras = &number.extras;
    if (has_counter && found_inf == 0.0F) number.expect_advance(rule, step, true);
  }
  if constexpr (Epilogue::kHasRowSteps) {
    if (random() % 2 == 0) epilogue.found_inf = {0.0, &found_inf};
  }
  // Large launches have the same code.
  sweep(rule, {3.0}, epilogue, rows.table, {2, false});
  rows.check();
  for (const auto& number : numbers) number.check();
}

// Those of a call have no counters. Its step may be on the device.
template <class Rule>
void check_called_scalars(const Rule& rule, size_t num_rows, std::mt19937_64& random) {
  const float third = 3.0F, found_inf = 1.0F;
  std::list<Numbers<Rule>> numbers;
  std::vector<RowScalars> rows;
  while (rows.size() < num_rows) rows.push_back(numbers.emplace_back(random).on_device(false));
  advance(rule, {3.0}, {0.0, &found_inf}, rows);
  for (const auto& number : numbers) number.check();
  for (const HostOrDeviceScalar& step : {HostOrDeviceScalar{3.0}, {0.0, &third}}) {
    for (auto& number : numbers) number.expect_advance(rule, 3.0, false);
    advance(rule, step, {}, rows);
    for (const auto& number : numbers) number.check();
  }
}

template <class Rule>
void check_rule_with_scalars(const Rule& rule) {
  // More than one launch advances.
  constexpr size_t kMany = cuda::AdvanceScalars<cuda::PaddedRule<Rule>>::kCapacity + 60;
  std::mt19937_64 random(0);
  for (int round = 0; round < 12; ++round) {
    check_scalars<StoreUpdate>(rule, 4, random);
    check_scalars<ApplyUpdate>(rule, 4, random);
  }
  for (int round = 0; round < 6; ++round) check_scalars<ApplyUpdate>(rule, 2 * kMany, random);
  for (const size_t count : {size_t{0}, size_t{1}, kMany})
    check_called_scalars(rule, count, random);
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
  check_rule_with_scalars(ScheduledAdam{{0.9, 0.999}, 0.004, {0.25}});
  check_rule_with_scalars(FourNumbers{{1.0, 0.5, 2.0, -3.0}, 0.25});
  std::mt19937_64 random(1);
  const PatientDescent waiting = patient_rules().front();
  for (int round = 0; round < 5; ++round) {
    check_kept_weights(waiting, random_epilogue<ApplyUpdate>(random), 0, random,
                       [](const PatientDescent& rule, double step, const ApplyUpdate& epilogue,
                          const auto& table) { sweep(rule, {step}, epilogue, table); });
  }
}
