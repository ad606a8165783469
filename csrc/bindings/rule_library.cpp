#include "rule_library.h"

#include <ATen/DynamicLibrary.h>

#include <memory>

namespace emopt {

const RegisteredRule& load_rule(const std::string& path, const std::string& name) {
  auto library = std::make_unique<at::DynamicLibrary>(path.c_str());
  using Function = const RuleInfo* (*)();
  const auto function = reinterpret_cast<Function>(library->sym(("emopt_rule_" + name).c_str()));
  const RuleInfo* const info = function();
  TORCH_CHECK(
      info->abi == EMOPT_ABI, path,
      " was compiled with the headers of another version of emerging_optimizers; compile it "
      "again");
  const auto* const rule = new RegisteredRule(register_rule(*info));
  library.release();
  return *rule;
}

}  // namespace emopt
