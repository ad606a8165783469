// Checks an operator's lists of tensors and makes the engine's table from them.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../engine/rule_info.h"
#include "../engine/table.h"
#include "operand_checks.h"

namespace emopt {

template <int kOperands>
class CheckedTable {
 public:
  explicit CheckedTable(const std::array<OperandList, kOperands>& lists) : lists_(lists) {
    const at::TensorList grads = lists_[kGrad].tensors;
    for (const OperandList& list : lists_) {
      TORCH_CHECK_VALUE(list.tensors.size() == grads.size(), list_name(list.name), " has ",
                        list.tensors.size(), " tensors but ", list_name("grad"), " has ",
                        grads.size());
    }
    table_.rows.reserve(grads.size());
  }

  // Adds all rows if none needs further checks; otherwise returns false.
  bool try_add_rows() {
    const size_t count = lists_[kGrad].tensors.size();
    for (size_t i = 0; i < count; ++i) {
      if (!needs_no_checks(i)) return false;
      table_.append(row(i));
    }
    return true;
  }

  // Adds all rows, or raises.
  void add_rows() {
    table_ = {};
    const size_t count = lists_[kGrad].tensors.size();
    table_.rows.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      if (!needs_no_checks(i)) {
        check_position(lists_, i);
        if (!shares_dense_layout(lists_, i)) strided_.push_back(i);
      }
      table_.append(row(i));
    }
  }

  // Finds the memory of all operands. Raises if it overlaps. Call this after the rows were added.
  void prepare(const RuleInstance& rule) {
    if (rule.scales_by_shape()) scale_rows(rule);
    // Modified operands come first: accessing their memory materializes a copy-on-write storage.
    for (const bool in_place : {true, false}) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (lists_[k].in_place == in_place) find_data(k);
      }
    }
    check_aliases();
    for (const size_t i : strided_) use_dense_copies(i);
  }

  // Lets all rows use scalar states in a device's memory; null: they are on the host.
  void set_scalars(RowExtras* scalars) {
    for (Row<kOperands>& row : table_.rows) row.extras = scalars;
  }

  const Table<kOperands>& table() const { return table_; }

  // Writes dense copies back and bumps versions. Call this after the sweep.
  void finish() const {
    dense_copies_.write_back();
    bump_versions(lists_);
  }

 private:
  C10_ALWAYS_INLINE bool needs_no_checks(size_t position) const {
    const at::Tensor& grad = lists_[kGrad].tensors[position];
    bool result = is_plain(grad);
    for (const OperandList& list : lists_) {
      const at::Tensor& tensor = list.tensors[position];
      result &= is_alike(tensor, grad) && tensor.unsafeGetTensorImpl()->is_contiguous();
    }
    return result;
  }

  Row<kOperands> row(size_t position) const {
    const at::Tensor& grad = lists_[kGrad].tensors[position];
    Row<kOperands> row;
    row.device = grad.is_cuda() ? grad.get_device() : kHost;
    row.scale = 1.0;
    row.numel = grad.numel();
    row.compute = DType::kFloat32;
    for (int k = 0; k < kOperands; ++k) {
      row.dtype[k] = to_dtype(lists_[static_cast<size_t>(k)].tensors[position].scalar_type());
      if (k != kUpdate && row.dtype[k] == DType::kFloat64) row.compute = DType::kFloat64;
    }
    return row;
  }

  void scale_rows(const RuleInstance& rule) {
    for (size_t i = 0; i < table_.rows.size(); ++i) {
      const at::Tensor& grad = lists_[kGrad].tensors[i];
      TORCH_CHECK_VALUE(grad.dim() == 2, position_name("grad", i), " has ", grad.dim(),
                        " dimensions; use_shape_scaling needs 2");
      table_.rows[i].scale = rule.info->shape_scale(grad.size(0), grad.size(1));
    }
  }

  void find_data(size_t k) {
    const OperandList& list = lists_[k];
    for (size_t i = 0; i < table_.rows.size(); ++i) {
      Row<kOperands>& row = table_.rows[i];
      const at::Tensor& tensor = list.tensors[i];
      row.data[k] =
          list.in_place ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
      TORCH_CHECK_VALUE(row.data[k] != nullptr || row.numel == 0, position_name(list.name, i),
                        " has no memory: its storage was resized to 0");
      // GPUs fault on misaligned elements.
      TORCH_CHECK_VALUE(row.device == kHost || is_aligned(row.data[k], row.dtype[k]),
                        position_name(list.name, i), " does not start at a multiple of its ",
                        size_of(row.dtype[k]), "-byte elements");
    }
  }

  // Modified operands must not share memory with each other or with operands that are read.
  void check_aliases() const {
    const auto each_range = [&](auto& visitor) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (k == kGrad) continue;
        visitor.start_list();
        each_row([&](const Row<kOperands>& row) { visitor.modify(range_of(row, k)); });
      }
      each_row([&](const Row<kOperands>& row) {
        if (!updates_grad(row)) visitor.read(range_of(row, kGrad));
      });
    };
    if (are_surely_apart(each_range, table_.rows.size() * kOperands)) return;
    refuse_sharing(lists_, [&](size_t k, size_t i) {
      return table_.rows[i].numel == 0 ? nullptr : table_.rows[i].data[k];
    });
  }

  template <class Visit>
  void each_row(const Visit& visit) const {
    for (const Row<kOperands>& row : table_.rows) {
      if (row.numel != 0) visit(row);
    }
  }

  size_t position_of(const Row<kOperands>& row) const {
    return static_cast<size_t>(&row - table_.rows.data());
  }

  bool updates_grad(const Row<kOperands>& row) const {
    if (row.data[kUpdate] != row.data[kGrad]) return false;
    const size_t i = position_of(row);
    return is_same_view(lists_[kUpdate].tensors[i], lists_[kGrad].tensors[i]);
  }

  EMOPT_FN ByteRange range_of(const Row<kOperands>& row, size_t k) const {
    if (!strided_.empty()) {
      const size_t i = position_of(row);
      if (std::binary_search(strided_.begin(), strided_.end(), i)) {
        return memory_of_tensor(lists_[k].tensors[i], row.data[k]).range;
      }
    }
    return byte_range(row.data[k], row.numel * size_of(row.dtype[k]));
  }

  void use_dense_copies(size_t position) {
    const at::Tensor layout =
        empty_update(lists_[kGrad].tensors[position], layout_list(lists_).tensors[position]);
    for (int k = 0; k < kOperands; ++k) {
      table_.rows[position].data[k] =
          dense_copies_.find(lists_[static_cast<size_t>(k)], position, k != kUpdate, layout)
              .mutable_data_ptr();
    }
  }

  const std::array<OperandList, kOperands>& lists_;
  Table<kOperands> table_;
  std::vector<size_t> strided_;  // positions that need dense copies, in order
  DenseCopies dense_copies_;
};

}  // namespace emopt
