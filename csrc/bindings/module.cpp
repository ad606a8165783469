// The extension module: built-in rules, rules from shared libraries, their entry points, and the
// optimizers' step.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <string>
#include <utility>
#include <vector>

#include "../engine/cpu/isa.h"
#include "../rules/all.h"
#include "entry_point.h"
#include "norm_sum.h"
#include "operand_checks.h"
#include "optimizer_step.h"
#include "rule_library.h"
#include "runtime_kernels.h"
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
    const std::vector<TracedRule::HyperparameterText>& hyperparameters,
    const std::vector<std::pair<std::string, double>>& scalar_states, int lowest_step,
    bool may_keep_weight, uint32_t num_constants, const std::vector<double>& step_constants,
    const std::vector<TracedRule::StepBlockText>& blocks, const std::vector<double>& literals,
    const std::vector<TracedRule::TileProgramText>& cases) {
  const RuleInfo& info =
      *interpreted({name, states, hyperparameters, scalar_states, lowest_step, may_keep_weight,
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
  m.def("_attach_library",
        torch::wrap_pybind_function(
            [](const py::capsule& rule, const std::string& path, const std::string& symbol) {
              const RegisteredRule& registered = *rule.get_pointer<RegisteredRule>();
              const py::gil_scoped_release without_gil;  // loading takes milliseconds
              attach_library(registered, path, symbol);
            }));
#if EMOPT_CUDA
  // A call that has passed the dispatcher; the last argument is the list of updates.
  m.def("_compute_if_native",
        torch::wrap_pybind_function([](const py::capsule& rule, const py::tuple& arguments) {
          std::vector<PyObject*> pointers;
          for (const py::handle argument : arguments) pointers.push_back(argument.ptr());
          const auto count = static_cast<Py_ssize_t>(pointers.size());
          const auto& registered = *rule.get_pointer<RegisteredRule>();
          return !update(registered, pointers.data(), count, /*is_dispatched=*/true).is_none();
        }));
  m.def("_attach_kernel",
        torch::wrap_pybind_function([](const py::capsule& rule, c10::DeviceIndex device,
                                       const KernelName& kernel, const std::string& symbol,
                                       const py::bytes& code) {
          const auto text = code.cast<std::string>();
          const RuleInfo& info = *rule.get_pointer<RegisteredRule>()->info;
          const py::gil_scoped_release without_gil;  // loading takes milliseconds
          attach_kernel(info, device, kernel, symbol, text);
        }));
  m.def("_wanted_kernels", [](const py::capsule& rule) {
    return wanted_kernels(*rule.get_pointer<RegisteredRule>()->info);
  });
#endif
  m.def("_rule_info", torch::wrap_pybind_function(rule_info), py::arg("path"), py::arg("symbol"));

  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_architectures") = py::cast(cuda_architectures());
  m.def("compiled_isas", [] { return names(cpu::compiled_isas()); });
  m.def("supported_isas", [] { return names(cpu::supported_isas()); });
  m.def("active_isa", [] { return cpu::name(cpu::active_isa()); });
  // For the fallback in Python, whose error messages name arguments in the same way.
  m.def("is_single_tensor_call", &SingleTensorCall::is_active);
}

}  // namespace emopt
