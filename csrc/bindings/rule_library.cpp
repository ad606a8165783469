#include "rule_library.h"

#include <ATen/DynamicLibrary.h>

#include <memory>

#include "../engine/cpu/isa.h"
#include "traced_rule.h"

namespace emopt {

namespace {

constexpr const char* kRecompile = "recompile it";
constexpr const char* kRebuild =
    "the package's headers changed after it was built: rebuild the package";

std::unique_ptr<at::DynamicLibrary> open_library(const std::string& path) {
  try {
    return std::make_unique<at::DynamicLibrary>(path.c_str());
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "cannot load ", path, ": ", error.what_without_backtrace());
  }
}

void* find(at::DynamicLibrary& library, const std::string& path, const std::string& name) {
  try {
    return library.sym(("emopt_rule_" + name).c_str());
  } catch (const c10::Error&) {
    TORCH_CHECK(false, path, " has no rule ", name, "; compile it with EMOPT_RULE(", name, ")");
  }
}

// Returns the description of a struct's rule in a shared library, which stays loaded.
const RuleInfo& open_rule(const std::string& path, const std::string& symbol, const char* cure) {
  std::unique_ptr<at::DynamicLibrary> library = open_library(path);
  using Function = const RuleInfo* (*)();
  const auto function = reinterpret_cast<Function>(find(*library, path, symbol));
  const RuleInfo& info = *function();
  TORCH_CHECK(info.abi == EMOPT_ABI, path,
              " was compiled with the headers of another version of emerging_optimizers; ", cure);
  const cpu::Isa isa = cpu::active_isa();
  TORCH_CHECK((info.loop_of<StoreUpdate, float>(static_cast<int>(isa))) != nullptr, path,
              " was not compiled for ", cpu::name(isa),
              ", the instruction set in use; recompile it for that");
  library.release();
  return info;
}

// The names of kinds and domains are those of _hyperparameters.py.
const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kFloat:
      return "number";
    case Kind::kFloats:
      return "numbers";
    case Kind::kOptionalFloat:
      return "optional";
    case Kind::kFlag:
      return "flag";
    case Kind::kWarmupSteps:
      return "warm-up";
    case Kind::kStep:
      return "step";
  }
  return "";
}

const char* name_of(Domain domain) {
  switch (domain) {
    case Domain::kAny:
      return "float";
    case Domain::kBeta:
      return "Beta";
    case Domain::kNonNegative:
      return "NonNegative";
    case Domain::kInteger:
      return "int";
  }
  return "";
}

// None: the state may not be stored as codes.
py::object name_of(StateCode code) {
  if (code == StateCode::kNone) return py::none();
  return py::str(code == StateCode::kSigned ? "signed" : "unsigned");
}

}  // namespace

const RegisteredRule& load_rule(const std::string& path, const std::string& symbol,
                                const std::string& operator_namespace, const std::string& name) {
  const RuleInfo& info = open_rule(path, symbol, name.empty() ? kRecompile : kRebuild);
  return *new RegisteredRule(register_rule(info, operator_namespace, name));
}

void attach_library(const RegisteredRule& rule, const std::string& path,
                    const std::string& symbol) {
  attach(*rule.info, open_rule(path, symbol, kRebuild), path);
}

py::dict rule_info(const std::string& path, const std::string& symbol) {
  const RuleInfo& info = open_rule(path, symbol, kRebuild);
  py::list states, codes, hyperparameters, scalar_states;
  for (uint32_t s = 0; s < info.num_states; ++s) {
    states.append(info.states[s]);
    codes.append(name_of(info.state_codes == nullptr ? StateCode::kNone : info.state_codes[s]));
  }
  for (uint32_t i = 0; i < info.num_hyperparameters; ++i) {
    const HyperparameterInfo& h = info.hyperparameters[i];
    hyperparameters.append(
        py::make_tuple(h.name, name_of(h.kind), name_of(h.domain), h.length, h.offset));
  }
  for (uint32_t i = 0; i < info.num_scalar_states; ++i) {
    scalar_states.append(py::make_tuple(info.scalar_states[i].name, info.scalar_states[i].first));
  }
  py::dict found;
  found["name"] = info.name;
  found["states"] = py::tuple(states);
  found["codes"] = py::tuple(codes);
  found["hyperparameters"] = py::tuple(hyperparameters);
  found["scalar_states"] = py::tuple(scalar_states);
  found["scalars_offset"] =
      scalar_states.empty() ? py::object(py::none()) : py::int_(info.scalars_offset);
  found["lowest_step"] = info.lowest_step;
  found["has_check"] = info.check != nullptr;
  found["shape_scale"] = py::none();
  if (info.shape_scale != nullptr) found["shape_scale"] = py::cpp_function(info.shape_scale);
  return found;
}

}  // namespace emopt
