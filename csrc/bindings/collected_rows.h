// The rows that a step has collected from one group: their memory, their order and their sweep.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "step_options.h"
#include "step_overlap.h"

namespace emopt {

template <int kStates>
class CollectedRows {
 public:
  static constexpr size_t kOperands = kNumOperands<kStates, ApplyUpdate>;
  static constexpr size_t kWeight = kOperands - 1;
  using RowOf = Row<static_cast<int>(kOperands)>;

  explicit CollectedRows(size_t num_params)
      : num_params_(num_params), read_(num_params), modified_(num_params * kOperands) {}

  // ---- collecting -------------------------------------------------------------------------------

  // Adds a row whose counter is on the host; `step` is its next value.
  void add(const RowOf& row, float* counter, double step) {
    Bucket& bucket = bucket_of({0, row.device, false, step});
    bucket.table.append(row);
    bucket.counters.push_back(counter);
  }
  // Adds a row whose counter is on its device.
  void add(const RowOf& row) { bucket_of({0, row.device, true, 1.0}).table.append(row); }

  // Adds what was collected from later parameters.
  void append(CollectedRows&& later) {
    for (auto& [key, bucket] : later.buckets_) {
      Bucket& mine = bucket_of(key);
      for (const RowOf& row : bucket.table.rows) mine.table.append(row);
      mine.counters.insert(mine.counters.end(), bucket.counters.begin(), bucket.counters.end());
    }
    const auto append = [](auto& mine, const auto& more) {
      mine.insert(mine.end(), more.begin(), more.end());
    };
    append(idle_counters_, later.idle_counters_);
    append(copied_, later.copied_);
    append(dtensors_, later.dtensors_);
    std::copy_n(later.read_.begin(), later.num_read_, read_.begin() + num_read_);
    num_read_ += later.num_read_;
    std::copy_n(later.modified_.begin(), later.num_modified_, modified_.begin() + num_modified_);
    num_modified_ += later.num_modified_;
  }

  // Adds the counter of a parameter that has no gradient, but counts its steps nevertheless.
  void add_idle(float* counter) { idle_counters_.push_back(counter); }
  // Adds a gradient that was copied. Its memory may still be another operand's.
  void add_copied(const StepOperand& grad) { copied_.push_back(grad); }
  void add_read(const at::Tensor& tensor) { read_[num_read_++] = tensor.unsafeGetTensorImpl(); }
  void add_modified(const at::Tensor& tensor) {
    modified_[num_modified_++] = tensor.unsafeGetTensorImpl();
  }
  // Adds a DTensor whose local tensor is modified: a DTensor has a version counter of its own.
  void add_modified_dtensor(const at::Tensor& tensor) {
    c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
    if (!impl->is_inference()) dtensors_.push_back(impl);
  }

  // ---- what shares memory -----------------------------------------------------------------------

  // These visit all ranges for `are_surely_apart`: first modified ones, then gradients.
  template <class Visitor>
  void each_modified(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (k == kGrad) continue;
        visitor.start_list();
        for (const RowOf& row : bucket.table.rows) {
          if (row.numel == 0 || (k == kWeight && weight_is_param(row))) continue;
          visitor.modify(range_of(row, k));
        }
      }
      visitor.start_list();
      for (const float* counter : bucket.counters) visitor.modify(range_of(counter));
      for (const RowOf& row : bucket.table.rows) {
        if (row.step != nullptr) visitor.modify(range_of(row.step));
      }
    }
  }
  template <class Visitor>
  void each_read(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      for (const RowOf& row : bucket.table.rows) {
        if (row.numel != 0 && row.data[kGrad] != row.data[kUpdate]) {
          visitor.read(range_of(row, kGrad));
        }
      }
    }
    for (const StepOperand& grad : copied_) visitor.read(grad.view.range);
  }
  size_t max_ranges() const { return num_params_ * (kOperands + 1) + copied_.size(); }

  void append_operands(std::vector<StepOperand>& operands) const {
    using Role = StepOperand::Role;
    operands.insert(operands.end(), copied_.begin(), copied_.end());
    for (const auto& [key, bucket] : buckets_) {
      for (size_t i = 0; i < bucket.table.rows.size(); ++i) {
        const RowOf& row = bucket.table.rows[i];
        const auto add = [&](Role role, ByteRange range) {
          operands.push_back({role, position_of(row), without_gaps(range)});
        };
        add(Role::kCounter, range_of(row.step == nullptr ? bucket.counters[i] : row.step));
        for (size_t k = 0; k < kOperands && row.numel != 0; ++k) {
          if (k == kWeight && weight_is_param(row)) continue;
          const bool is_state = k != kUpdate && k != kGrad;
          add(is_state       ? Role::kState
              : k == kUpdate ? Role::kParam
                             : Role::kGrad,
              range_of(row, k));
        }
      }
    }
  }

  // Sorts the rows into waves. Removes those that must wait for the fallback, and appends their
  // positions in the optimizer to `remaining`.
  void settle(const StepOrder& order, std::vector<uint32_t>& remaining) {
    std::map<BucketKey, Bucket> old;
    old.swap(buckets_);
    last_ = nullptr;
    for (const auto& [old_key, old_bucket] : old) {
      for (size_t i = 0; i < old_bucket.table.rows.size(); ++i) {
        const RowOf& row = old_bucket.table.rows[i];
        if (order.is_remaining(position_of(row))) {
          remaining.push_back(position_of(row));
          continue;
        }
        BucketKey key = old_key;
        key.wave = order.wave(position_of(row));
        Bucket& bucket = bucket_of(key);
        bucket.table.append(row);
        if (row.step == nullptr) bucket.counters.push_back(old_bucket.counters[i]);
      }
    }
  }

  // ---- the sweep --------------------------------------------------------------------------------

  int64_t numel() const {
    int64_t numel = 0;
    for (const auto& [key, bucket] : buckets_) numel += bucket.table.numel;
    return numel;
  }
  bool any_on_device() const {
    return std::any_of(buckets_.begin(), buckets_.end(),
                       [](const auto& entry) { return entry.second.table.any_on_device; });
  }

  // Autograd detects in-place modifications by these counters.
  void bump_versions() {
    for (size_t i = 0; i < num_modified_; ++i) modified_[i]->bump_version();
    for (c10::TensorImpl* const dtensor : dtensors_) dtensor->bump_version();
  }

  // Appends the storages that must stay alive during the sweep.
  void append_storages(std::vector<c10::intrusive_ptr<c10::StorageImpl>>& storages) const {
    const auto append = [&](c10::TensorImpl* tensor) {
      c10::StorageImpl* const storage = tensor->unsafe_storage().unsafeGetStorageImpl();
      storages.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    };
    std::for_each_n(read_.begin(), num_read_, append);
    std::for_each_n(modified_.begin(), num_modified_, append);
  }

  // Updates the rows of one wave. Does not need the GIL.
  void step(uint32_t wave, const RuleInstance& rule, GroupOptions& options, StepScalars& scalars) {
    for (auto& [key, bucket] : buckets_) {
      if (key.wave != wave) continue;
      ApplyUpdate epilogue = options.epilogue;
      epilogue.lr = options.lr.on(key.device);
      epilogue.grad_multiplier = scalars.grad_multiplier.on(key.device);
      epilogue.grad_scale = scalars.grad_scale.on(key.device);
      epilogue.found_inf = scalars.found_inf.on(key.device);
      sweep<kStates>(rule, {key.step}, epilogue, bucket.table);
      for (float* counter : bucket.counters) *counter = static_cast<float>(key.step);
    }
    for (float* counter : idle_counters_) *counter = static_cast<float>(*options.count + 1.0);
  }

  static ByteRange range_of(const RowOf& row, size_t k) {
    return byte_range(row.data[k], row.numel * size_of(row.dtype[k]));
  }

 private:
  // Rows of one device and one step.
  struct Bucket {
    Table<static_cast<int>(kOperands)> table;
    std::vector<float*> counters;
  };
  struct BucketKey {
    uint32_t wave;
    int8_t device;
    bool counts_on_device;
    double step;
    auto tied() const { return std::tie(wave, device, counts_on_device, step); }
    bool operator<(const BucketKey& other) const { return tied() < other.tied(); }
  };

  Bucket& bucket_of(const BucketKey& key) {
    if (last_ != nullptr && last_->first.tied() == key.tied()) return last_->second;
    const bool is_first = buckets_.empty();
    last_ = &*buckets_.try_emplace(key).first;
    if (is_first) last_->second.table.rows.reserve(num_params_);  // usually the only bucket
    return last_->second;
  }

  static bool weight_is_param(const RowOf& row) { return row.data[kWeight] == row.data[kUpdate]; }
  static ByteRange range_of(const float* counter) { return byte_range(counter, sizeof(float)); }
  // A parameter's position in the optimizer, without the shard's number in the high bits.
  static uint32_t position_of(const RowOf& row) { return static_cast<uint32_t>(row.position); }

  size_t num_params_;
  std::map<BucketKey, Bucket> buckets_;
  std::pair<const BucketKey, Bucket>* last_ = nullptr;
  std::vector<float*> idle_counters_;
  std::vector<StepOperand> copied_;
  std::vector<c10::TensorImpl*> read_, modified_;  // the first num_read_ and num_modified_ are set
  size_t num_read_ = 0, num_modified_ = 0;
  std::vector<c10::TensorImpl*> dtensors_;
};

}  // namespace emopt
