#include "operators.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "called_scalars.h"
#include "checked_table.h"
#include "runtime_kernels.h"

namespace emopt {

namespace {

// ---- the computation ----------------------------------------------------------------------------

template <int kStates>
using CallLists = std::array<OperandList, kNumOperands<kStates, StoreUpdate>>;

template <int kStates>
CallLists<kStates> operand_lists(const OperatorCall& call) {
  CallLists<kStates> lists{OperandList{"out", call.lists[kUpdate], true},
                           OperandList{"grad", call.lists[kGrad], false}};
  for (size_t s = 0; s < kStates; ++s) {
    lists[kFirstState + s] = {call.rule.info->states[s], call.lists[kFirstState + s], true};
  }
  return lists;
}

c10::SmallVector<NumberTensor, 1 + kMaxScalarStates> number_tensors(const OperatorCall& call) {
  c10::SmallVector<NumberTensor, 1 + kMaxScalarStates> numbers;
  if (call.step.tensor.has_value()) numbers.push_back({"step", *call.step.tensor});
  for (size_t i = 0; i < call.scalars.size(); ++i) {
    numbers.push_back({call.rule.info->scalar_states[i].name, call.scalars[i]});
  }
  return numbers;
}

// Whether the dispatcher would choose the native kernel for this tensor.
bool is_native(const RuleInfo& info, const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.unsafeGetTensorImpl()->key_set();
  return keys == kPlainOnCpu || (info.has_cuda_kernels() && keys == kPlainOnCuda);
}

bool are_native(const OperatorCall& call) {
  const auto is_known = [&](const at::Tensor& t) { return is_native(*call.rule.info, t); };
  return std::all_of(call.lists.begin(), call.lists.end(), [&](at::TensorList list) {
    return std::all_of(list.begin(), list.end(), is_known);
  });
}

// Whether the kernels that a call needs are loaded.
bool has_kernels(const OperatorCall& call) {
  const RuleInfo& info = *call.rule.info;
  if (!has_runtime_kernels(info)) return true;
  const bool advances_there = !call.scalars.empty() && call.scalars[0].is_cuda();
  const bool needs_setup =
      advances_there || (call.step.tensor.has_value() && call.step.tensor->is_cuda());
  const at::TensorList grads = call.lists[kGrad];
  bool has_all = true;
  if (advances_there) has_all = has_advance_kernel(info, call.scalars[0].get_device());
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].is_cuda()) continue;
    bool is_double = false;
    for (size_t k = kGrad; k < kFirstState + info.num_states; ++k) {
      is_double |= call.lists[k][i].scalar_type() == at::kDouble;
    }
    has_all &= has_kernel<StoreUpdate>(info, grads[i].get_device(), is_double, needs_setup);
  }
  return has_all;
}

template <int kStates>
class Computation {
 public:
  explicit Computation(const OperatorCall& call)
      : call_(call),
        lists_(operand_lists<kStates>(call)),
        checked_(lists_),
        has_rows_(checked_.try_add_rows()) {}

  // Whether the dispatcher would choose the native kernel.
  bool is_native() const {
    const bool any_on_device = checked_.table().any_on_device;
    const bool are_known = !any_on_device || call_.rule.info->has_cuda_kernels();
    return ((has_rows_ && are_known) || are_native(call_)) && has_kernels(call_);
  }

  void run() {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const HostOrDeviceScalar step = check_call(call_);
    if (call_.step.tensor.has_value() || !call_.scalars.empty()) {
      check_number_devices(lists_, number_tensors(call_));
    }
    if (!has_rows_) checked_.add_rows();
    checked_.prepare(call_.rule);
    if (call_.scalars.empty()) {
      sweep<kStates>(call_.rule, step, StoreUpdate(), &checked_.table(), 1);
    } else {
      CalledScalars scalars(call_);
      RuleInstance rule = call_.rule;
      scalars.read(rule, lists_);
      checked_.set_scalars(scalars.on_device());
      sweep<kStates>(rule, step, StoreUpdate(), &checked_.table(), 1);
      scalars.advance(rule, step);
    }
    checked_.finish();
  }

 private:
  const OperatorCall& call_;
  CallLists<kStates> lists_;
  CheckedTable<kNumOperands<kStates, StoreUpdate>> checked_;
  bool has_rows_;
};

// ---- kernels ------------------------------------------------------------------------------------

// A call whose arguments are on the stack of a boxed kernel.
class BoxedCall {
 public:
  BoxedCall(const RuleInfo& info, torch::jit::Stack& stack) : stack_(stack) {
    call_.rule.info = &info;
    const size_t num_lists = kFirstState + info.num_states;
    num_arguments_ = num_lists + info.num_hyperparameters + info.num_scalar_states + 1;
    const auto arguments = torch::jit::last(stack, num_arguments_);
    for (size_t k = 0; k < num_lists; ++k) {
      tensors_[k] = arguments[k].toTensorVector();
      call_.lists[k] = tensors_[k];
    }
    for (size_t i = 0; i < info.num_hyperparameters; ++i) {
      read(info.hyperparameters[i], arguments[num_lists + i], call_.rule, call_.step);
    }
    for (size_t i = num_lists + info.num_hyperparameters; i + 1 < num_arguments_; ++i) {
      call_.scalars.push_back(arguments[i].toTensor());
    }
    call_.step.tensor = arguments[num_arguments_ - 1].toOptional<at::Tensor>();
  }

  const OperatorCall& call() const { return call_; }
  void finish() { torch::jit::drop(stack_, num_arguments_); }

 private:
  torch::jit::Stack& stack_;
  size_t num_arguments_;
  std::array<std::vector<at::Tensor>, kFirstState + kMaxStates> tensors_;
  OperatorCall call_;
};

struct RuleKernel : c10::OperatorKernel {
  const RuleInfo& info;
  explicit RuleKernel(const RuleInfo& info_) : info(info_) {}
};

struct NativeKernel final : RuleKernel {
  using RuleKernel::RuleKernel;
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    BoxedCall boxed(info, *stack);
    with_num_states(info.num_states,
                    [&](auto num_states) { Computation<num_states>(boxed.call()).run(); });
    boxed.finish();
  }
};

// Checks that all tensors are meta.
struct MetaKernel final : RuleKernel {
  using RuleKernel::RuleKernel;
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    BoxedCall boxed(info, *stack);
    with_num_states(info.num_states, [&](auto num_states) {
      check_all_meta(operand_lists<num_states>(boxed.call()), number_tensors(boxed.call()));
    });
    boxed.finish();
  }
};

// Called during torch.jit.trace.
struct TracerKernel final : c10::OperatorKernel {
  const std::string function;
  explicit TracerKernel(std::string function_) : function(std::move(function_)) {}
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*) {
    refuse_trace(function);
  }
};

template <class Kernel, class Argument>
torch::CppFunction boxed(const Argument& argument) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(argument));
}

// `plural` follows the name of a state, in that of its list.
std::string schema_of(const RuleInfo& info, const std::string& operator_name, const char* plural) {
  std::string text = operator_name + "(Tensor(a!)[] updates, Tensor[] grads";
  char alias = 'b';
  for (uint32_t s = 0; s < info.num_states; ++s) {
    text += std::string(", Tensor(") + alias++ + "!)[] " + info.states[s] + plural;
  }
  for (uint32_t i = 0; i < info.num_hyperparameters; ++i) {
    text += ", " + schema_of(info.hyperparameters[i]);
  }
  for (uint32_t i = 0; i < info.num_scalar_states; ++i) {
    text += std::string(", Tensor(") + alias++ + "!) " + info.scalar_states[i].name;
  }
  return text + ", *, Tensor? step_tensor=None) -> ()";
}

// Never destroyed: a library's destructor removes its registrations.
torch::Library& add_library(const std::string& name_space) {
  return *new torch::Library(torch::Library::FRAGMENT, name_space, std::nullopt, __FILE__,
                             __LINE__);
}

}  // namespace

// ---- the operator -------------------------------------------------------------------------------

RegisteredRule register_rule(const RuleInfo& info, const std::string& name_space,
                             const std::string& given_name) {
  TORCH_INTERNAL_ASSERT(info.num_states <= kMaxStates && info.num_bytes <= kMaxRuleBytes);
  for (const uint32_t bytes : info.constants_bytes) {
    TORCH_INTERNAL_ASSERT(bytes <= kMaxConstantsBytes);
  }
  const std::string name = given_name.empty() ? info.name : given_name;
  const std::string function = name_space == kNamespace ? "calculate_" + name + "_update" : name;
  const std::string operator_name = name + "_update_";
  const std::string full_name = name_space + "::" + operator_name;
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  TORCH_CHECK(!dispatcher.findSchema({full_name, ""}).has_value(), "a rule named ", name,
              " is already registered; ",
              given_name.empty() ? "compile this one with a different kName"
                                 : "register this one under a different name");
  torch::Library& library = add_library(name_space);
  // A user's state may be named "a": "as" is a word of the schemas' language.
  const char* const plural = name_space == kNamespace ? "s" : "_list";
  library.def(schema_of(info, operator_name, plural).c_str(), {at::Tag::pt2_compliant_tag});
  const auto implement = [&](c10::DispatchKey key, torch::CppFunction kernel) {
    library.impl(operator_name.c_str(), torch::dispatch(key, std::move(kernel)));
  };
  implement(c10::DispatchKey::CPU, boxed<NativeKernel>(info));
  // While kernels that are compiled at run time are not there, the formula runs, which Python
  // calls.
  if (info.has_cuda_kernels() && !has_runtime_kernels(info)) {
    implement(c10::DispatchKey::CUDA, boxed<NativeKernel>(info));
  }
  implement(c10::DispatchKey::Meta, boxed<MetaKernel>(info));
  implement(c10::DispatchKey::Tracer, boxed<TracerKernel>(function));
  // Updates are not differentiable. Without this, PyTorch's autograd fallback would search all
  // lists for tensors that require gradients.
  implement(c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough());
  return {&info, name, function, dispatcher.findSchemaOrThrow(full_name.c_str(), "")};
}

HostOrDeviceScalar check_call(const OperatorCall& call) {
  check_hyperparameters(call.rule);
  return checked_step(call.rule, call.step);
}

bool compute_directly(const OperatorCall& call) {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  if (!(included - c10::default_included_set).empty()) return false;
  if (at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value()) return false;
  return compute_if_native(call);
}

bool compute_if_native(const OperatorCall& call) {
  const auto is_known = [&](const at::Tensor& t) { return is_native(*call.rule.info, t); };
  if (call.step.tensor.has_value() && !is_known(*call.step.tensor)) return false;
  if (!std::all_of(call.scalars.begin(), call.scalars.end(), is_known)) return false;
  return with_num_states(call.rule.info->num_states, [&](auto num_states) {
    Computation<num_states> computation(call);
    if (!computation.is_native()) return false;
    computation.run();
    return true;
  });
}

void dispatch(const RegisteredRule& rule, const OperatorCall& call) {
  torch::jit::Stack stack;
  for (size_t k = 0; k < rule.num_lists(); ++k) {
    c10::List<at::Tensor> list;
    list.reserve(call.lists[k].size());
    for (const at::Tensor& tensor : call.lists[k]) list.push_back(tensor);
    stack.emplace_back(std::move(list));
  }
  for (uint32_t i = 0; i < rule.info->num_hyperparameters; ++i) {
    stack.push_back(to_ivalue(rule.info->hyperparameters[i], call.rule, call.step));
  }
  for (const at::Tensor& scalar : call.scalars) stack.emplace_back(scalar);
  stack.emplace_back(call.step.tensor);
  rule.handle.callBoxed(stack);
}

void refuse_trace(const std::string& what) {
  TORCH_CHECK(false, "torch.jit.trace cannot record ", what,
              ": use torch.compile or torch.export, or call it outside of what is traced");
}

}  // namespace emopt
