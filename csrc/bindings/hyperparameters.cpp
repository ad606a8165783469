#include "hyperparameters.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "operand_checks.h"
#include "python_arguments.h"

namespace emopt {

namespace {

// ---- the kinds of hyperparameters ---------------------------------------------------------------

template <class Value>
void put(const HyperparameterInfo& info, RuleInstance& rule, const Value& value) {
  std::memcpy(rule.bytes + info.offset, &value, sizeof(value));
}
template <class Value>
Value get(const HyperparameterInfo& info, const RuleInstance& rule, size_t index = 0) {
  Value value;
  std::memcpy(&value, rule.bytes + info.offset + index * sizeof(value), sizeof(value));
  return value;
}

struct FloatKind {
  static constexpr const char* kSchema = "float";
  static void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
    put(info, rule, read_number(info.name, value));
  }
  static void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule) {
    put(info, rule, value.toDouble());
  }
  static c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule) {
    return get<double>(info, rule);
  }
  static void check(const HyperparameterInfo& info, const RuleInstance& rule) {
    check_domain(info.name, -1, get<double>(info, rule), info.domain);
  }
};

struct FloatsKind {
  static constexpr const char* kSchema = "float[]";
  static void put_all(const HyperparameterInfo& info, at::ArrayRef<double> values,
                      RuleInstance& rule) {
    TORCH_CHECK_VALUE(values.size() == info.length, info.name, " has ", values.size(),
                      " values; expected ", info.length);
    std::memcpy(rule.bytes + info.offset, values.data(), values.size() * sizeof(double));
  }
  static void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
    put_all(info, read_numbers(info.name, value), rule);
  }
  static void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule) {
    put_all(info, value.toDoubleVector(), rule);
  }
  static c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule) {
    c10::List<double> values;
    for (size_t i = 0; i < info.length; ++i) values.push_back(get<double>(info, rule, i));
    return values;
  }
  static void check(const HyperparameterInfo& info, const RuleInstance& rule) {
    for (size_t i = 0; i < info.length; ++i) {
      check_domain(info.name, static_cast<int>(i), get<double>(info, rule, i), info.domain);
    }
  }
};

// NaN stands for None, so it is no value.
struct OptionalFloatKind {
  static constexpr const char* kSchema = "float?";
  static void put_optional(const HyperparameterInfo& info, std::optional<double> value,
                           RuleInstance& rule) {
    if (value.has_value() && std::isnan(*value)) check_domain(info.name, -1, *value, info.domain);
    put(info, rule, value.value_or(std::numeric_limits<double>::quiet_NaN()));
  }
  static void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
    put_optional(info, read_optional_number(info.name, value), rule);
  }
  static void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule) {
    put_optional(info, value.toOptional<double>(), rule);
  }
  static c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule) {
    const auto value = get<double>(info, rule);
    return std::isnan(value) ? c10::IValue() : c10::IValue(value);
  }
  static void check(const HyperparameterInfo& info, const RuleInstance& rule) {
    const auto value = get<double>(info, rule);
    if (!std::isnan(value)) check_domain(info.name, -1, value, info.domain);
  }
};

struct FlagKind {
  static constexpr const char* kSchema = "bool";
  static void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
    put(info, rule, read_flag(info.name, value));
  }
  static void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule) {
    put(info, rule, value.toBool());
  }
  static c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule) {
    return get<bool>(info, rule);
  }
  static void check(const HyperparameterInfo&, const RuleInstance&) {}
};

// None and 0 mean the same.
struct WarmupStepsKind {
  static constexpr const char* kSchema = "int?";
  static void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
    put(info, rule, read_warmup_steps(info.name, value).value_or(0));
  }
  static void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule) {
    put(info, rule, value.isNone() ? int64_t{0} : value.toInt());
  }
  static c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule) {
    const auto steps = get<int64_t>(info, rule);
    return steps == 0 ? c10::IValue() : c10::IValue(steps);
  }
  static void check(const HyperparameterInfo& info, const RuleInstance& rule) {
    check_domain(info.name, -1, static_cast<double>(get<int64_t>(info, rule)), info.domain);
  }
};

// Calls `visit` with the kind, unless it is the step.
template <class Visit>
void with_kind(Kind kind, const Visit& visit) {
  switch (kind) {
    case Kind::kFloat:
      return visit(FloatKind());
    case Kind::kFloats:
      return visit(FloatsKind());
    case Kind::kOptionalFloat:
      return visit(OptionalFloatKind());
    case Kind::kFlag:
      return visit(FlagKind());
    case Kind::kWarmupSteps:
      return visit(WarmupStepsKind());
    case Kind::kStep:
      return;
  }
}

}  // namespace

std::string schema_of(const HyperparameterInfo& info) {
  std::string type = "SymInt";
  with_kind(info.kind, [&](auto kind) { type = kind.kSchema; });
  return type + " " + info.name;
}

void read(const HyperparameterInfo& info, PyObject* value, RuleInstance& rule) {
  with_kind(info.kind, [&](auto kind) { kind.read(info, value, rule); });
}

void read(const HyperparameterInfo& info, const c10::IValue& value, RuleInstance& rule,
          StepArgumentValue& step) {
  if (info.kind == Kind::kStep) step.step = value.toSymInt();
  with_kind(info.kind, [&](auto kind) { kind.read(info, value, rule); });
}

c10::IValue to_ivalue(const HyperparameterInfo& info, const RuleInstance& rule,
                      const StepArgumentValue& step) {
  c10::IValue value = info.kind == Kind::kStep ? c10::IValue(step.step) : c10::IValue();
  with_kind(info.kind, [&](auto kind) { value = kind.to_ivalue(info, rule); });
  return value;
}

void check_hyperparameters(const RuleInstance& rule) {
  for (uint32_t i = 0; i < rule.info->num_hyperparameters; ++i) {
    const HyperparameterInfo& info = rule.info->hyperparameters[i];
    with_kind(info.kind, [&](auto kind) { kind.check(info, rule); });
  }
  if (rule.info->check == nullptr) return;
  char text[512] = "";
  ErrorText error{text, sizeof(text)};
  rule.info->check(rule.bytes, error);
  TORCH_CHECK_VALUE(error.is_empty(), text);
}

HostOrDeviceScalar checked_step(const RuleInstance& rule, const StepArgumentValue& step) {
  const auto is_step = [](const HyperparameterInfo& info) { return info.kind == Kind::kStep; };
  const HyperparameterInfo* const begin = rule.info->hyperparameters;
  if (std::none_of(begin, begin + rule.info->num_hyperparameters, is_step)) return {};
  const int64_t lowest = rule.lowest_step();
  double value = 0.0;
  if (step.tensor.has_value()) {
    const at::Tensor& tensor = *step.tensor;
    const at::ScalarType type = tensor.scalar_type();
    TORCH_CHECK_TYPE(tensor.dim() == 0 && (type == at::kLong || type == at::kFloat),
                     "step is a tensor of dtype ", dtype_text(type), " with ", tensor.dim(),
                     " dimensions; expected an int or a 0-dim tensor of dtype int64 or float32");
    TORCH_CHECK_TYPE(tensor.is_cpu() || tensor.is_cuda(), "step is on ", tensor.device(),
                     "; expected a tensor on the CPU or a CUDA device");
    using Type = HostOrDeviceScalar::Type;
    const HostOrDeviceScalar scalar{0.0, tensor.const_data_ptr(),
                                    type == at::kLong ? Type::kInt64 : Type::kFloat32};
    if (tensor.is_cuda()) return scalar;
    value = scalar.read();
    TORCH_CHECK_VALUE(!std::isnan(value), "step is nan; expected a whole number");
    TORCH_CHECK_TYPE(std::isfinite(value) && std::floor(value) == value, "step is ",
                     number_text(value), "; expected a whole number");
  } else {
    value = static_cast<double>(step.step.guard_int(__FILE__, __LINE__));
  }
  TORCH_CHECK_VALUE(value >= static_cast<double>(lowest), "step is ", number_text(value),
                    "; expected step >= ", lowest,
                    rule.corrects_bias() ? " (with bias correction, steps count from 1)"
                    : lowest == 1        ? " (steps count from 1)"
                                         : "");
  return {value};
}

std::string number_text(double value) {
  char text[32];
  const bool is_short_integer = std::abs(value) < 1e16 && std::floor(value) == value;
  const auto end = is_short_integer
                       ? std::to_chars(text, text + sizeof(text), static_cast<int64_t>(value)).ptr
                       : std::to_chars(text, text + sizeof(text), value).ptr;
  return std::string(text, end);
}

void check_domain(const char* name, int index, double value, Domain domain) {
  const bool is_inside = domain == Domain::kBeta          ? value >= 0.0 && value < 1.0
                         : domain == Domain::kNonNegative ? value >= 0.0
                         : domain == Domain::kInteger
                             ? std::isfinite(value) && std::floor(value) == value
                             : !std::isnan(value);
  if (is_inside) return;
  const std::string full_name =
      index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
  const std::string expected = domain == Domain::kBeta          ? "0 <= " + full_name + " < 1"
                               : domain == Domain::kNonNegative ? full_name + " >= 0"
                               : domain == Domain::kInteger     ? "a whole number"
                                                                : "a number";
  TORCH_CHECK_VALUE(false, full_name, " is ", number_text(value), "; expected ", expected);
}

}  // namespace emopt
