#include "rule_library.h"

#include <ATen/DynamicLibrary.h>

#include <memory>

namespace emopt {

namespace {

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

}  // namespace

const RegisteredRule& load_rule(const std::string& path, const std::string& name) {
  std::unique_ptr<at::DynamicLibrary> library = open_library(path);
  using Function = const RuleInfo* (*)();
  const auto function = reinterpret_cast<Function>(find(*library, path, name));
  const RuleInfo* const info = function();
  TORCH_CHECK(info->abi == EMOPT_ABI, path,
              " was compiled with the headers of another version of emerging_optimizers; compile "
              "it again");
  const auto* const rule = new RegisteredRule(register_rule(*info));
  library.release();
  return *rule;
}

}  // namespace emopt
