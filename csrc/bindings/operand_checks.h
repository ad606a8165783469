// From lists of tensors to the engine's table: every check of a tensor is made here, before
// anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <string>

#include "../engine/operands.h"

namespace emopt {

// One tensor argument of an operator: a list, named as its single form is ("grad", "exp_avg").
struct OperandList {
  const char* name;
  at::TensorList tensors;
  bool in_place;
};

// While one lives, messages speak of `exp_avg` where they would otherwise of `exp_avgs[0]`: the
// user passed single tensors, of which the operators see lists of one.
class SingleTensorCall {
 public:
  explicit SingleTensorCall(bool is_single);
  ~SingleTensorCall();
  SingleTensorCall(const SingleTensorCall&) = delete;
  SingleTensorCall& operator=(const SingleTensorCall&) = delete;

  static bool is_active();

 private:
  bool outer_;
};

// "exp_avgs[3]", "out[3]"; in a call on single tensors "exp_avg", "out".
std::string position_name(const char* name, size_t position);
std::string list_name(const char* name);

// The layout that a position's operands are brought to where they do not share a dense one: that of
// its state, which is also the layout of a new update.
at::Tensor empty_update(const at::Tensor& grad, const at::Tensor& state);

// A tensor that stands in for one whose layout the engine cannot sweep beside the others'.
struct StandIn {
  at::Tensor original;
  at::Tensor dense;
  bool in_place;
};

// Positions in the lists that passed all checks. `lists` are in the order of a row's operands.
class CheckedOperands {
 public:
  explicit CheckedOperands(c10::ArrayRef<OperandList> lists);

  size_t size() const { return lists_[kGrad].tensors.size(); }

  // The tensor to compute with: the user's, or its stand-in. Filled ones are those that are read.
  template <int kOperands>
  Row<kOperands> row(size_t position, double scale);

  // Writes stand-ins back, and tells autograd what was modified.
  void finish();

 private:
  bool shares_dense_layout(size_t position) const;
  void check_position(size_t position) const;
  void check_aliases() const;
  at::Tensor stand_in(const OperandList& list, size_t position, const at::Tensor& layout);

  c10::ArrayRef<OperandList> lists_;
  std::vector<StandIn> stand_ins_;
};

DType to_dtype(at::ScalarType type);

// A layout and a dtype that can be computed with, or a TypeError.
void check_storage(const char* name, const at::Tensor& tensor, size_t position);

// For operators on meta tensors: real ones among them are an error.
void check_all_meta(const char* name, at::TensorList tensors);

template <int kOperands>
Row<kOperands> CheckedOperands::row(size_t position, double scale) {
  Row<kOperands> row;
  row.scale = scale;
  row.numel = lists_[kGrad].tensors[position].numel();
  row.compute = DType::kFloat32;
  const bool is_dense = shares_dense_layout(position);
  const at::Tensor layout = is_dense ? at::Tensor()
                                     : empty_update(lists_[kGrad].tensors[position],
                                                    lists_[kFirstState].tensors[position]);
  for (int k = 0; k < kOperands; ++k) {
    const OperandList& list = lists_[static_cast<size_t>(k)];
    const at::Tensor& tensor = list.tensors[position];
    row.dtype[k] = to_dtype(tensor.scalar_type());
    if (k != kUpdate && row.dtype[k] == DType::kFloat64) row.compute = DType::kFloat64;
    if (is_dense) {
      row.data[k] = list.in_place ? tensor.mutable_data_ptr()
                                  : const_cast<void*>(tensor.const_data_ptr());
    } else {
      row.data[k] = stand_in(list, position, layout).mutable_data_ptr();
    }
  }
  return row;
}

}  // namespace emopt
