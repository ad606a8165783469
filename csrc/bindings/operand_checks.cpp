#include "operand_checks.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <sstream>
#include <tuple>

namespace emopt {

namespace {

thread_local bool single_tensor_call = false;

std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d == 0 ? "" : ", ") << sizes[d];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// The update comes last: if the user passed none, it was created in the first state's layout.
const OperandList& in_check_order(OperandLists lists, size_t k) {
  return lists[(k + kGrad) % lists.size()];
}

[[noreturn]] void refuse_device(const std::string& name, const at::Tensor& tensor,
                                const std::string& other_name, const at::Tensor& other) {
  const std::string message =
      c10::str(name, " is on ", tensor.device(), " but ", other_name, " is on ", other.device());
  TORCH_CHECK_TYPE(tensor.is_meta() == other.is_meta(), message);
  TORCH_CHECK_VALUE(false, message);
}

void check_device(const OperandList& list, size_t position, const OperandList& other,
                  size_t other_position) {
  const at::Tensor& tensor = list.tensors[position];
  const at::Tensor& beside = other.tensors[other_position];
  if (tensor.device() == beside.device()) return;
  refuse_device(position_name(list.name, position), tensor,
                position_name(other.name, other_position), beside);
}

void check_number_device(OperandLists lists, const char* name, const at::Tensor& number) {
  if (number.is_cpu()) return;
  const at::TensorList grads = lists[kGrad].tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].device() == number.device()) continue;
    refuse_device(name, number, position_name("grad", i), grads[i]);
  }
}

}  // namespace

bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a.strides()[d] != b.strides()[d]) return false;
  }
  return true;
}

std::string dtype_text(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return "uint8";
    case at::kChar:
      return "int8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kHalf:
      return "float16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kComplexHalf:
      return "complex32";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    case at::kBool:
      return "bool";
    case at::kBFloat16:
      return "bfloat16";
    default: {
      std::string text = c10::toString(type);
      std::transform(text.begin(), text.end(), text.begin(),
                     [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      return text;
    }
  }
}

SingleTensorCall::SingleTensorCall(bool is_single) : outer_(single_tensor_call) {
  single_tensor_call = is_single;
}
SingleTensorCall::~SingleTensorCall() { single_tensor_call = outer_; }

bool SingleTensorCall::is_active() { return single_tensor_call; }

std::string list_name(const char* name) {
  const bool is_plural = single_tensor_call || std::string_view(name) == "out";
  return is_plural ? name : std::string(name) + "s";
}

std::string position_name(const char* name, size_t position) {
  return single_tensor_call ? name : list_name(name) + "[" + std::to_string(position) + "]";
}

at::Tensor empty_update(const at::Tensor& grad, const at::Tensor& state) {
  const auto dtype = c10::promoteTypes(grad.scalar_type(), state.scalar_type());
  return at::empty_like(state, state.options().dtype(dtype).requires_grad(false));
}

void check_storage(const char* name, const at::Tensor& tensor, size_t position) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(),
                   position_name(name, position), " has layout ",
                   tensor.is_nested() ? "nested" : c10::str(tensor.layout()),
                   "; expected a strided (dense) tensor");
  TORCH_CHECK_TYPE(is_supported_dtype(tensor.scalar_type()), position_name(name, position),
                   " has dtype ", dtype_text(tensor.scalar_type()),
                   "; expected float32, float64, bfloat16 or float16");
}

void check_all_meta(OperandLists lists, NumberTensors numbers) {
  const at::TensorList grads = lists[kGrad].tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    for (size_t k = 0; k < lists.size(); ++k) {
      const OperandList& list = in_check_order(lists, k);
      if (i < list.tensors.size()) check_device(list, i, lists[kGrad], i);
    }
    check_device(lists[kGrad], i, lists[kGrad], 0);
  }
  if (grads.empty() || grads[0].is_meta()) return;
  for (const auto& [name, tensor] : numbers) check_number_device(lists, name, tensor);
}

void check_number_devices(OperandLists lists, NumberTensors numbers) {
  for (const auto& [name, tensor] : numbers) check_number_device(lists, name, tensor);
}

void check_position(OperandLists lists, size_t position) {
  const at::Tensor& grad = lists[kGrad].tensors[position];
  for (size_t k = 0; k < lists.size(); ++k) {
    const OperandList& list = in_check_order(lists, k);
    check_storage(list.name, list.tensors[position], position);
  }
  for (size_t k = 0; k < lists.size(); ++k) {
    const OperandList& list = in_check_order(lists, k);
    const at::Tensor& tensor = list.tensors[position];
    const auto name = [&] { return position_name(list.name, position); };  // only if a check fails
    check_device(list, position, lists[kGrad], position);
    TORCH_CHECK_VALUE(tensor.sizes() == grad.sizes(), name(), " has shape ",
                      shape_text(tensor.sizes()), " but ", position_name("grad", position),
                      " has shape ", shape_text(grad.sizes()));
    if (!list.in_place) continue;
    TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), name(),
                " is an inference tensor, which cannot be modified outside of inference mode");
    if (tensor.numel() <= 1 || tensor.is_non_overlapping_and_dense()) continue;
    const Sharing how =
        self_sharing(tensor.sizes().data(), tensor.strides().data(), tensor.sizes().size());
    TORCH_CHECK_VALUE(how != Sharing::kUnknown, "cannot tell whether ", name(),
                      " overlaps itself in memory: it has shape ", shape_text(tensor.sizes()),
                      " and strides ", shape_text(tensor.strides()),
                      "; pass a copy of it (.clone())");
    TORCH_CHECK_VALUE(how == Sharing::kNone, name(),
                      " overlaps itself in memory (an expanded tensor, with shape ",
                      shape_text(tensor.sizes()), " and strides ", shape_text(tensor.strides()),
                      "), so it cannot be modified in place; pass a copy of it (.clone())");
  }
}

bool shares_dense_layout(OperandLists lists, size_t position) {
  const at::Tensor& state = layout_list(lists).tensors[position];
  return state.is_non_overlapping_and_dense() &&
         std::all_of(lists.begin(), lists.end(), [&](const OperandList& list) {
           return same_strides(list.tensors[position], state);
         });
}

bool is_same_view(const at::Tensor& a, const at::Tensor& b) {
  return a.is_same(b) || (a.scalar_type() == b.scalar_type() && same_strides(a, b));
}

MemoryView memory_of_tensor(const at::Tensor& tensor, const void* address) {
  return memory_view(address, static_cast<int64_t>(tensor.element_size()), tensor.sizes().data(),
                     tensor.strides().data(), tensor.sizes().size());
}

void refuse_sharing(OperandLists lists,
                    const std::function<const void*(size_t k, size_t position)>& address_of) {
  // Modified operands come first, as in the messages.
  struct Operand {
    const OperandList* list;
    size_t position;
  };
  std::vector<Operand> operands;
  std::vector<UsedMemory> used;
  for (const bool in_place : {true, false}) {
    for (size_t i = 0; i < lists[kGrad].tensors.size(); ++i) {
      for (size_t k = 0; k < lists.size(); ++k) {
        const void* const address = address_of(k, i);
        if (lists[k].in_place != in_place || address == nullptr) continue;
        operands.push_back({&lists[k], i});
        used.push_back({memory_of_tensor(lists[k].tensors[i], address), in_place});
      }
    }
  }
  const auto updates_grad = [&](size_t first, size_t second) {
    const size_t i = operands[second].position;
    return operands[second].list == &lists[kGrad] && operands[first].list == &lists[kUpdate] &&
           operands[first].position == i && address_of(kUpdate, i) == address_of(kGrad, i) &&
           is_same_view(lists[kUpdate].tensors[i], lists[kGrad].tensors[i]);
  };
  // Report a pair that certainly shares memory rather than an undecided one; of those, the first.
  using Pair = std::tuple<Sharing, size_t, size_t>;
  std::optional<Pair> worst;
  find_sharing(used, [&](size_t first, size_t second, Sharing how) {
    if (updates_grad(first, second)) return;
    const Pair pair{how, second, first};
    if (!worst || pair < *worst) worst = pair;
  });
  if (!worst) return;
  const auto [how, second, first] = *worst;
  const auto name = [&](size_t k) {
    return position_name(operands[k].list->name, operands[k].position);
  };
  TORCH_CHECK_VALUE(how == Sharing::kSome, "cannot tell whether ", name(second),
                    " shares memory with ", name(first), ", and ", name(first),
                    " is modified in place; pass contiguous tensors");
  TORCH_CHECK_VALUE(false, name(second), " shares memory with ", name(first), ", and ", name(first),
                    " is modified in place; pass a different tensor for each (only `out` may be "
                    "`grad`)");
}

at::Tensor DenseCopies::find(const OperandList& list, size_t position, bool is_read,
                             const at::Tensor& layout) {
  const at::Tensor& tensor = list.tensors[position];
  if (same_strides(tensor, layout)) return tensor;
  at::Tensor dense =
      at::empty_strided(layout.sizes(), layout.strides(), layout.options().dtype(tensor.dtype()));
  if (is_read) dense.copy_(tensor);
  dense_copies_.push_back({tensor, dense, list.in_place});
  return dense;
}

void DenseCopies::write_back() const {
  for (const DenseCopy& copy : dense_copies_) {
    if (copy.in_place) copy.original.copy_(copy.dense);
  }
}

void bump_versions(OperandLists lists) {
  for (const OperandList& list : lists) {
    if (!list.in_place) continue;
    for (const at::Tensor& tensor : list.tensors) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace emopt
