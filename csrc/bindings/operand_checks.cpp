#include "operand_checks.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <sstream>

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

bool is_supported_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// "int64", "float8_e4m3fn": as Python spells it, after "torch.".
std::string dtype_text(at::ScalarType type) {
  switch (type) {
    case at::kByte: return "uint8";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    case at::kHalf: return "float16";
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kComplexHalf: return "complex32";
    case at::kComplexFloat: return "complex64";
    case at::kComplexDouble: return "complex128";
    case at::kBool: return "bool";
    case at::kBFloat16: return "bfloat16";
    default: {
      std::string text = c10::toString(type);
      std::transform(text.begin(), text.end(), text.begin(),
                     [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      return text;
    }
  }
}

// Dimensions of more than one element, from the smallest stride to the largest.
using Dimension = std::pair<int64_t, int64_t>;  // stride, size
c10::SmallVector<Dimension, 6> dimensions_by_stride(const at::Tensor& tensor) {
  c10::SmallVector<Dimension, 6> dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  return dimensions;
}

// Whether two indices of the tensor are the same element in memory.
bool overlaps_itself(const at::Tensor& tensor) {
  if (tensor.numel() <= 1 || tensor.is_non_overlapping_and_dense()) return false;
  const auto dimensions = dimensions_by_stride(tensor);
  if (dimensions.front().first == 0) return true;
  int64_t reach = 0;  // the last element's offset over the dimensions so far
  bool is_nested = true;
  for (const auto& [stride, size] : dimensions) {
    is_nested &= stride > reach;
    reach += stride * (size - 1);
  }
  if (is_nested) return false;
  // Interleaved dimensions, which only as_strided makes: look at every offset.
  std::vector<int64_t> offsets{0};
  offsets.reserve(static_cast<size_t>(tensor.numel()));
  for (const auto& [stride, size] : dimensions) {
    const size_t count = offsets.size();
    for (int64_t i = 1; i < size; ++i) {
      for (size_t k = 0; k < count; ++k) offsets.push_back(offsets[k] + i * stride);
    }
  }
  std::sort(offsets.begin(), offsets.end());
  return std::adjacent_find(offsets.begin(), offsets.end()) != offsets.end();
}

bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a.strides()[d] != b.strides()[d]) return false;
  }
  return true;
}

bool is_same_view(const at::Tensor& a, const at::Tensor& b) {
  return a.is_same(b) || (a.scalar_type() == b.scalar_type() && same_strides(a, b));
}

// Finds operands that start at one address. Open addressing, so that a thousand tensors cost
// microseconds, not a tree's or a node hash's tens.
class AddressSet {
 public:
  struct Entry {
    const void* address = nullptr;
    uint32_t list = 0;
    uint32_t position = 0;
  };

  explicit AddressSet(size_t count) {
    while ((size_t{1} << bits_) < 2 * count) ++bits_;
    slots_.resize(size_t{1} << bits_);
  }

  // The entry with this address; one with a null address where there is none yet.
  Entry& find(const void* address) {
    const uint64_t key = reinterpret_cast<uintptr_t>(address);
    size_t slot = static_cast<size_t>((key * 0x9e3779b97f4a7c15u) >> (64 - bits_));
    while (slots_[slot].address != nullptr && slots_[slot].address != address) {
      slot = (slot + 1) & (slots_.size() - 1);
    }
    return slots_[slot];
  }

 private:
  int bits_ = 3;
  std::vector<Entry> slots_;
};

}  // namespace

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

DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
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

void check_all_meta(const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_TYPE(tensors[i].is_meta(), position_name(name, i), " is on ", tensors[i].device(),
                     " but other tensors of the call are on meta");
  }
}

CheckedOperands::CheckedOperands(c10::ArrayRef<OperandList> lists) : lists_(lists) {
  const OperandList& grads = lists_[kGrad];
  for (const OperandList& list : lists_) {
    TORCH_CHECK_VALUE(list.tensors.size() == grads.tensors.size(), list_name(list.name), " has ",
                      list.tensors.size(), " tensors but ", list_name(grads.name), " has ",
                      grads.tensors.size());
  }
  for (size_t i = 0; i < size(); ++i) check_position(i);
  check_aliases();
}

void CheckedOperands::check_position(size_t position) const {
  const at::Tensor& grad = lists_[kGrad].tensors[position];
  for (const OperandList& list : lists_) {
    check_storage(list.name, list.tensors[position], position);
  }
  for (const OperandList& list : lists_) {
    const at::Tensor& tensor = list.tensors[position];
    if (tensor.device() != grad.device()) {
      const std::string message = c10::str(
          position_name(list.name, position), " is on ", tensor.device(), " but ",
          position_name(lists_[kGrad].name, position), " is on ", grad.device());
      TORCH_CHECK_TYPE(tensor.is_meta() == grad.is_meta(), message);
      TORCH_CHECK_VALUE(false, message);
    }
    TORCH_CHECK_VALUE(tensor.sizes() == grad.sizes(), position_name(list.name, position),
                      " has shape ", shape_text(tensor.sizes()), " but ",
                      position_name(lists_[kGrad].name, position), " has shape ",
                      shape_text(grad.sizes()));
    if (!list.in_place) continue;
    TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(),
                position_name(list.name, position),
                " is an inference tensor, which cannot be modified outside of inference mode");
    TORCH_CHECK_VALUE(!overlaps_itself(tensor), position_name(list.name, position),
                      " overlaps itself in memory (an expanded tensor, with shape ",
                      shape_text(tensor.sizes()), " and strides ", shape_text(tensor.strides()),
                      "), so it cannot be modified in place; pass a copy of it (.clone())");
  }
}

void CheckedOperands::check_aliases() const {
  // Operands that are modified must be different from each other and from those that are read.
  AddressSet addresses(lists_.size() * size());
  const auto name_of = [&](const AddressSet::Entry& entry) {
    return position_name(lists_[entry.list].name, entry.position);
  };
  const auto refuse = [&](const AddressSet::Entry& first, const AddressSet::Entry& second) {
    TORCH_CHECK_VALUE(false, name_of(second), " starts at the same element as ", name_of(first),
                      ", and ", name_of(first),
                      " is modified in place; pass a different tensor for each (only `out` may be "
                      "`grad`)");
  };
  for (const bool in_place : {true, false}) {
    for (uint32_t k = 0; k < lists_.size(); ++k) {
      if (lists_[k].in_place != in_place) continue;
      for (uint32_t i = 0; i < size(); ++i) {
        const at::Tensor& tensor = lists_[k].tensors[i];
        if (tensor.numel() == 0) continue;
        const AddressSet::Entry here{
            in_place ? tensor.mutable_data_ptr() : tensor.const_data_ptr(), k, i};
        AddressSet::Entry& found = addresses.find(here.address);
        if (found.address == nullptr) {
          if (in_place) found = here;
        } else if (in_place || found.list != kUpdate || found.position != i ||
                   !is_same_view(lists_[kUpdate].tensors[i], tensor)) {
          refuse(found, here);
        }
      }
    }
  }
}

bool CheckedOperands::shares_dense_layout(size_t position) const {
  bool all_contiguous = true;
  for (const OperandList& list : lists_) {
    all_contiguous &= list.tensors[position].is_contiguous();
  }
  if (all_contiguous) return true;
  const at::Tensor& state = lists_[kFirstState].tensors[position];
  return state.is_non_overlapping_and_dense() &&
         std::all_of(lists_.begin(), lists_.end(), [&](const OperandList& list) {
           return same_strides(list.tensors[position], state);
         });
}

at::Tensor CheckedOperands::stand_in(const OperandList& list, size_t position,
                                     const at::Tensor& layout) {
  const at::Tensor& tensor = list.tensors[position];
  if (same_strides(tensor, layout)) return tensor;
  at::Tensor dense =
      at::empty_strided(layout.sizes(), layout.strides(), layout.options().dtype(tensor.dtype()));
  if (&list != &lists_[kUpdate]) dense.copy_(tensor);
  stand_ins_.push_back({tensor, dense, list.in_place});
  return dense;
}

void CheckedOperands::finish() {
  for (const StandIn& stand_in : stand_ins_) {
    if (stand_in.in_place) stand_in.original.copy_(stand_in.dense);
  }
  for (const OperandList& list : lists_) {
    if (!list.in_place) continue;
    for (const at::Tensor& tensor : list.tensors) {
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace emopt
