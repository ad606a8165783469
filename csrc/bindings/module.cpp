// The extension module: built-in rules, rules from shared libraries, their entry points, and the
// optimizers' step.
#include <ATen/DynamicLibrary.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../engine/cpu/isa.h"
#include "../rules/all.h"
#include "entry_point.h"
#include "norm_sum.h"
#include "operand_checks.h"
#include "optimizer_step.h"
#include "traced_rule.h"
#if EMOPT_CUDA
#include "../engine/cuda/device_sweep.h"
#endif

#define EMOPT_DECLARE(Rule) extern "C" const emopt::RuleInfo* emopt_rule_##Rule();
EMOPT_FOR_EACH_RULE(EMOPT_DECLARE)
#undef EMOPT_DECLARE

namespace emopt {

namespace {

// Registered once per process.
const std::vector<const RegisteredRule*>& builtin_rules() {
  static const auto* const rules = [] {
    auto* registered = new std::vector<const RegisteredRule*>;
#define EMOPT_REGISTER(Rule) \
  registered->push_back(new RegisteredRule(register_rule(*emopt_rule_##Rule())));
    EMOPT_FOR_EACH_RULE(EMOPT_REGISTER)
#undef EMOPT_REGISTER
    return registered;
  }();
  return *rules;
}

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

// Calls `use` with the rule of a struct from a shared library, which then stays loaded.
template <class Use>
auto with_library(const std::string& path, const std::string& symbol, const char* cure, Use use) {
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
  const auto result = use(info);
  library.release();
  return result;
}

constexpr const char* kRebuild =
    "the package's headers changed after it was built: rebuild the package";

// Loads the rule of a struct from a shared library and registers it.
const RegisteredRule& load_rule(const std::string& path, const std::string& symbol,
                                const std::string& operator_namespace, const std::string& name) {
  const char* const cure = name.empty() ? "recompile it" : kRebuild;
  return *with_library(path, symbol, cure, [&](const RuleInfo& info) {
    return new RegisteredRule(register_rule(info, operator_namespace, name));
  });
}

// Gives an interpreted rule the compiled code of a shared library.
void attach_library(const py::capsule& rule, const std::string& path, const std::string& symbol) {
  const RuleInfo& interpreted = *rule.get_pointer<RegisteredRule>()->info;
  const py::gil_scoped_release without_gil;  // loading takes milliseconds
  with_library(path, symbol, kRebuild, [&](const RuleInfo& compiled) {
    attach(interpreted, compiled, path);
    return true;
  });
}

struct EntryPoint {
  const RegisteredRule* rule;
  std::string name;
  PyMethodDef definition;
};

PyObject* enter(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto* entry = static_cast<const EntryPoint*>(PyCapsule_GetPointer(self, nullptr));
  return update(*entry->rule, arguments, count).release().ptr();
  END_HANDLE_TH_ERRORS
}

// A Python function without pybind11's dispatch overhead. It lives as long as the process.
py::object entry_point(const RegisteredRule& rule) {
  auto* const entry = new EntryPoint{&rule, rule.function, {}};
  // METH_FASTCALL makes Python call it with `enter`'s signature.
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&enter));
  entry->definition = {entry->name.c_str(), function, METH_FASTCALL, nullptr};
  const py::capsule self(entry);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&entry->definition, self.ptr()));
}

// What Python has of a rule: the handle that the optimizers' step takes, and the entry point.
std::pair<py::object, py::object> handles(const RegisteredRule& rule) {
  return {py::capsule(&rule), entry_point(rule)};
}

// Registers a rule that is interpreted. Its description is that of TracedRule.
std::pair<py::object, py::object> interpret_rule(
    const std::string& operator_namespace, const std::string& operator_name,
    const std::string& name, const std::vector<std::string>& states,
    const std::vector<TracedRule::HyperparameterText>& hyperparameters, int lowest_step,
    bool may_keep_weight, uint32_t num_constants, const std::vector<double>& step_constants,
    const std::vector<TracedRule::StepBlockText>& blocks, const std::vector<double>& literals,
    const std::vector<TracedRule::TileProgramText>& cases) {
  const RuleInfo& info = *interpreted({name, states, hyperparameters, lowest_step, may_keep_weight,
                                       num_constants, step_constants, blocks, literals, cases});
  return handles(*new RegisteredRule(register_rule(info, operator_namespace, operator_name)));
}

// Adds `rules[name]` and `<name>_update` to the module.
void bind_rule(const py::module_& module, const std::string& name,
               const std::pair<py::object, py::object>& rule) {
  module.attr("rules")[name.c_str()] = rule.first;
  module.attr((name + "_update").c_str()) = rule.second;
}

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
  std::vector<std::string> result;
  for (const cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
  return result;
}

// "sm_90"
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> result;
#if EMOPT_CUDA
  for (const int architecture : cuda::compiled_architectures()) {
    result.push_back("sm_" + std::to_string(architecture / 10));
  }
#endif
  return result;
}

}  // namespace

// Read from the file before it is loaded (_native.py). Exported, so that no linker drops it.
extern PYBIND11_EXPORT const char built_for[];
const char built_for[] = "emerging_optimizers is built for torch " TORCH_VERSION;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("rules") = py::dict();
  for (const RegisteredRule* rule : builtin_rules()) bind_rule(m, rule->name, handles(*rule));
  m.def("step", torch::wrap_pybind_function(optimizer_step));
  m.def("_count_walks_on_threads", count_walks_on_threads);
  m.def("norm_sum", torch::wrap_pybind_function(norm_sum), py::arg("params"), py::arg("grads"),
        py::arg("order"));
  // For rules that are compiled separately; not public yet. In the package's namespace, a rule
  // becomes an attribute of the module, like those of the package.
  m.def("_load_rule",
        torch::wrap_pybind_function([m](const std::string& path, const std::string& symbol,
                                        const std::string& operator_namespace,
                                        const std::string& name) {
          const RegisteredRule& rule = load_rule(path, symbol, operator_namespace, name);
          auto loaded = handles(rule);
          if (operator_namespace == kNamespace) bind_rule(m, rule.name, loaded);
          return loaded;
        }),
        py::arg("path"), py::arg("symbol"), py::arg("operator_namespace") = kNamespace,
        py::arg("name") = "");
  m.def("_interpret_rule", torch::wrap_pybind_function(interpret_rule));
  m.def("_attach_library", torch::wrap_pybind_function(attach_library));

  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_architectures") = py::cast(cuda_architectures());
  m.def("compiled_isas", [] { return names(cpu::compiled_isas()); });
  m.def("supported_isas", [] { return names(cpu::supported_isas()); });
  m.def("active_isa", [] { return cpu::name(cpu::active_isa()); });
  // For the fallback in Python, whose error messages name arguments in the same way.
  m.def("is_single_tensor_call", &SingleTensorCall::is_active);
}

}  // namespace emopt
