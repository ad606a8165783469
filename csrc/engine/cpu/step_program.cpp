#include "step_program.h"

#include <math.h>

#include <cstring>

#include "../../rules/schedules.h"
#include "../../rules/traced.h"

namespace emopt::cpu {

namespace {

struct NamedFunction {
  const char* name;
  StepFunction function;
};

#define EMOPT_STEP(name, expression)                                   \
  {name, [](double a, double b, double c) -> double {                  \
     static_cast<void>(a), static_cast<void>(b), static_cast<void>(c); \
     return expression;                                                \
   }}
#define EMOPT_LIBM_1(name) EMOPT_STEP(#name, ::name(a))
#define EMOPT_LIBM_2(name) EMOPT_STEP(#name, ::name(a, b))

constexpr NamedFunction kFunctions[] = {
    EMOPT_STEP("+", a + b),
    EMOPT_STEP("-", a - b),
    EMOPT_STEP("*", a* b),
    EMOPT_STEP("/", a / b),
    EMOPT_STEP("<", a < b),
    EMOPT_STEP("<=", a <= b),
    EMOPT_STEP(">", a > b),
    EMOPT_STEP(">=", a >= b),
    EMOPT_STEP("==", a == b),
    EMOPT_STEP("!=", a != b),
    EMOPT_STEP("&&", a != 0.0 && b != 0.0),
    EMOPT_STEP("||", a != 0.0 || b != 0.0),
    EMOPT_STEP("!", a == 0.0),
    EMOPT_STEP("neg", -a),
    EMOPT_STEP("where", a != 0.0 ? b : c),
    EMOPT_STEP("abs", ::fabs(a)),
    EMOPT_STEP("min", b < a ? b : a),
    EMOPT_STEP("max", b > a ? b : a),
    EMOPT_STEP("floor_divide", floor_divide(a, b)),
    EMOPT_STEP("floor_modulo", floor_modulo(a, b)),
    EMOPT_STEP("one_minus_power", one_minus_power(a, b)),
    EMOPT_LIBM_1(acos),
    EMOPT_LIBM_1(acosh),
    EMOPT_LIBM_1(asin),
    EMOPT_LIBM_1(asinh),
    EMOPT_LIBM_1(atan),
    EMOPT_LIBM_2(atan2),
    EMOPT_LIBM_1(atanh),
    EMOPT_LIBM_1(cbrt),
    EMOPT_LIBM_1(ceil),
    EMOPT_LIBM_2(copysign),
    EMOPT_LIBM_1(cos),
    EMOPT_LIBM_1(cosh),
    EMOPT_LIBM_1(erf),
    EMOPT_LIBM_1(erfc),
    EMOPT_LIBM_1(exp),
    EMOPT_LIBM_1(exp2),
    EMOPT_LIBM_1(expm1),
    EMOPT_LIBM_1(floor),
    EMOPT_LIBM_2(fmod),
    EMOPT_LIBM_2(hypot),
    EMOPT_LIBM_1(log),
    EMOPT_LIBM_1(log10),
    EMOPT_LIBM_1(log1p),
    EMOPT_LIBM_1(log2),
    EMOPT_LIBM_1(nearbyint),
    EMOPT_LIBM_2(pow),
    EMOPT_LIBM_1(sin),
    EMOPT_LIBM_1(sinh),
    EMOPT_LIBM_1(sqrt),
    EMOPT_LIBM_1(tan),
    EMOPT_LIBM_1(tanh),
    EMOPT_LIBM_1(trunc),
};

#undef EMOPT_LIBM_2
#undef EMOPT_LIBM_1
#undef EMOPT_STEP

double load(const unsigned char* bytes, const StepProgram::Source& source) {
  if (source.is_flag) return bytes[source.offset] != 0 ? 1.0 : 0.0;
  double number;
  std::memcpy(&number, bytes + source.offset, sizeof(number));
  return number;
}

}  // namespace

StepFunction step_function(const std::string& name) {
  for (const NamedFunction& known : kFunctions) {
    if (name == known.name) return known.function;
  }
  return nullptr;
}

namespace {

// The values of a step, and the block that it ends with.
struct Evaluation {
  std::vector<double> registers;
  const StepBlock* end;

  Evaluation(const RuleInstance& rule, double step) {
    const StepProgram& program = rule.info->program->step;
    registers = program.registers;
    size_t next = 0;
    registers[next++] = step;
    for (const auto& source : program.sources) registers[next++] = load(rule.bytes, source);
    end = &program.blocks.front();
    while (true) {
      for (const StepInstruction& i : end->instructions) {
        registers[i.to] = i.apply(registers[i.a], registers[i.b], registers[i.c]);
      }
      if (end->is_end) break;
      const bool is_true = registers[end->condition] != 0.0;
      end = &program.blocks[is_true ? end->if_true : end->if_false];
    }
  }
};

}  // namespace

template <class Real>
void evaluate_step(const RuleInstance& rule, double step, void* constants) {
  const Program& program = *rule.info->program;
  const Evaluation done(rule, step);
  const StepConstants<Real> result(program, constants);
  const std::vector<uint16_t>& used = done.end->constants;
  for (size_t i = 0; i < program.num_constants; ++i) {
    result.set(i, i < used.size() ? done.registers[used[i]] : 0.0);
  }
  result.set_case(done.end->which, done.end->keeps_weight);
}

void advance_scalars(RuleInstance& rule, double step) {
  const Evaluation done(rule, step);
  for (uint32_t i = 0; i < rule.info->num_scalar_states; ++i) {
    rule.set_scalar(i, done.registers[done.end->scalars[i]]);
  }
}

template void evaluate_step<float>(const RuleInstance&, double, void*);
template void evaluate_step<double>(const RuleInstance&, double, void*);

}  // namespace emopt::cpu
