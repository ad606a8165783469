// The rows that a step has collected from one group: their memory, their order and their sweep.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../engine/codes.h"
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

  // For at most so many parameters, each with so many scalar states and scales.
  CollectedRows(size_t num_params, size_t num_extras) : num_params_(num_params) {
    tensors_.emplace_back(num_params, kOperands + num_extras);
  }

  // ---- collecting -------------------------------------------------------------------------------

  // Adds a row whose counter is on the host; `step` is its next value.
  void add(const RowOf& row, float* counter, double step) {
    BucketKey key{0, row.device, false, step, {}};
    each_scalar(row, [&, next = key.scalars.begin()](const float* scalar) mutable {
      std::memcpy(&*next++, scalar, sizeof(*scalar));
    });
    bucket_of(key).append(row, counter);
  }
  // Adds a row whose counter is on its device.
  void add(const RowOf& row) { bucket_of({0, row.device, true, 1.0, {}}).append(row, nullptr); }

  // Empty ones for a row; at most as many as there are parameters.
  RowExtras* new_extras() {
    if (num_kept_ == 0) kept_.emplace_back(new RowExtras[num_params_]);
    return &(kept_.back()[num_kept_++] = {});
  }

  // Adds the counter of a parameter that has no gradient, but counts its steps nevertheless.
  void add_idle(float* counter) { idle_counters_.push_back(counter); }
  // Adds a gradient that was copied. Its memory may still be another operand's.
  void add_copied(const StepOperand& grad) { copied_.push_back(grad); }
  void add_read(const at::Tensor& tensor) { tensors_.back().read.add(tensor); }
  void add_modified(const at::Tensor& tensor) { tensors_.back().modified.add(tensor); }
  // Adds a DTensor whose local tensor is modified: a DTensor has a version counter of its own.
  void add_modified_dtensor(const at::Tensor& tensor) {
    c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
    if (!impl->is_inference()) dtensors_.push_back(impl);
  }

  // Adds what another thread has collected from later parameters.
  void append(CollectedRows&& later) {
    num_params_ += later.num_params_;
    for (auto& [key, bucket] : later.buckets_) {
      const auto [mine, is_new] = buckets_.try_emplace(key, std::move(bucket));
      if (!is_new) mine->second.append(std::move(bucket));
    }
    const auto move = [](auto& list, auto& more) {
      std::move(more.begin(), more.end(), std::back_inserter(list));
    };
    move(kept_, later.kept_);
    num_kept_ = 0;  // another array is next
    move(tensors_, later.tensors_);
    move(idle_counters_, later.idle_counters_);
    move(copied_, later.copied_);
    move(dtensors_, later.dtensors_);
  }

  // ---- what shares memory -----------------------------------------------------------------------

  // These visit all ranges for `are_surely_apart`: first modified ones, then gradients.
  template <class Visitor>
  void each_modified(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (k == kGrad) continue;
        visitor.start_list();
        bucket.each_row([&](const RowOf& row, const float*) {
          if (row.numel == 0 || (k == kWeight && weight_is_param(row))) return;
          visitor.modify(range_of(row, k));
        });
      }
      visitor.start_list();
      bucket.each_row(
          [&](const RowOf&, const float* counter) { visitor.modify(range_of(counter)); });
      if (kept_.empty()) continue;
      visitor.start_list();
      bucket.each_row([&](const RowOf& row, const float*) {
        each_scalar(row, [&](const float* scalar) { visitor.modify(range_of(scalar)); });
        each_scales(row, [&](ByteRange scales) { visitor.modify(scales); });
      });
    }
  }
  template <class Visitor>
  void each_read(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      bucket.each_row([&](const RowOf& row, const float*) {
        if (row.numel != 0 && row.data[kGrad] != row.data[kUpdate]) {
          visitor.read(range_of(row, kGrad));
        }
      });
    }
    for (const StepOperand& grad : copied_) visitor.read(grad.view.range);
  }
  size_t max_ranges() const {
    const size_t most_extras = kept_.empty() ? 0 : kMaxScalarStates + kStates;
    return num_params_ * (kOperands + 1 + most_extras) + copied_.size();
  }

  void append_operands(std::vector<StepOperand>& operands) const {
    using Role = StepOperand::Role;
    operands.insert(operands.end(), copied_.begin(), copied_.end());
    for (const auto& [key, bucket] : buckets_) {
      bucket.each_row([&](const RowOf& row, const float* counter) {
        const auto add = [&](Role role, ByteRange range) {
          operands.push_back({role, position_of(row), without_gaps(range)});
        };
        add(Role::kCounter, range_of(counter));
        each_scalar(row, [&](const float* scalar) { add(Role::kCounter, range_of(scalar)); });
        each_scales(row, [&](ByteRange scales) { add(Role::kState, scales); });
        for (size_t k = 0; k < kOperands && row.numel != 0; ++k) {
          if (k == kWeight && weight_is_param(row)) continue;
          const bool is_state = k != kUpdate && k != kGrad;
          add(is_state       ? Role::kState
              : k == kUpdate ? Role::kParam
                             : Role::kGrad,
              range_of(row, k));
        }
      });
    }
  }

  // Sorts the rows into waves. Removes those that must wait for the fallback, and appends their
  // positions in the optimizer to `remaining`.
  void settle(const StepOrder& order, std::vector<uint32_t>& remaining) {
    std::map<BucketKey, Bucket> old;
    old.swap(buckets_);
    last_ = nullptr;
    for (const auto& [old_key, old_bucket] : old) {
      old_bucket.each_row([&, &key = old_key](const RowOf& row, float* counter) {
        if (order.is_remaining(position_of(row))) {
          remaining.push_back(position_of(row));
          return;
        }
        BucketKey new_key = key;
        new_key.wave = order.wave(position_of(row));
        bucket_of(new_key).append(row, counter);
      });
    }
  }

  // ---- the sweep --------------------------------------------------------------------------------

  int64_t numel() const {
    int64_t numel = 0;
    for (const auto& [key, bucket] : buckets_) {
      for (const TableOf& table : bucket.tables) numel += table.numel;
    }
    return numel;
  }
  bool any_on_device() const {
    return std::any_of(buckets_.begin(), buckets_.end(),
                       [](const auto& entry) { return entry.first.device != kHost; });
  }

  // Autograd detects in-place modifications by these counters.
  void bump_versions() {
    const auto bump = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (c10::TensorImpl* const tensor : tensors_[i].modified) tensor->bump_version();
      }
    };
    // On the threads that have collected them, in whose caches they are.
    const auto count = static_cast<int64_t>(tensors_.size());
    count > 1 ? at::parallel_for(0, count, 1, bump) : bump(0, count);
    for (c10::TensorImpl* const dtensor : dtensors_) dtensor->bump_version();
  }

  size_t num_storages() const {
    size_t count = 0;
    for (const TouchedTensors& tensors : tensors_) {
      count += tensors.read.size() + tensors.modified.size();
    }
    return count;
  }

  // Appends the storages that must stay alive during the sweep.
  void append_storages(std::vector<c10::intrusive_ptr<c10::StorageImpl>>& storages) const {
    const auto append = [&](c10::TensorImpl* tensor) {
      c10::StorageImpl* const storage = tensor->unsafe_storage().unsafeGetStorageImpl();
      storages.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    };
    for (const TouchedTensors& tensors : tensors_) {
      std::for_each(tensors.read.begin(), tensors.read.end(), append);
      std::for_each(tensors.modified.begin(), tensors.modified.end(), append);
    }
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
      RuleInstance at_step = rule;
      for (uint32_t i = 0; i < rule.info->num_scalar_states; ++i) {
        at_step.set_scalar(i, static_cast<double>(bit_cast<float>(key.scalars[i])));
      }
      sweep<kStates>(at_step, {key.step}, epilogue, bucket.tables.data(), bucket.tables.size());
      for (float* counter : bucket.counters) *counter = static_cast<float>(key.step);
      if (rule.info->num_scalar_states != 0 && !key.counts_on_device) {
        rule.info->advance(at_step, key.step);
        bucket.each_row([&](const RowOf& row, const float*) {
          each_scalar(row, [&, i = 0u](float* scalar) mutable {
            *scalar = static_cast<float>(at_step.scalar(i++));
          });
        });
      }
    }
    for (float* counter : idle_counters_) *counter = static_cast<float>(*options.count + 1.0);
  }

  static ByteRange range_of(const RowOf& row, size_t k) {
    return byte_range(row.data[k], row.numel * size_of(row.dtype[k]));
  }

 private:
  using TableOf = Table<static_cast<int>(kOperands)>;

  // Rows of one device and one step; a table for each thread that has collected some.
  struct Bucket {
    c10::SmallVector<TableOf, 1> tables = c10::SmallVector<TableOf, 1>(1);
    std::vector<float*> counters;  // of all rows, if on the host

    // `counter` is null if it is on the row's device.
    void append(const RowOf& row, float* counter) {
      tables.back().append(row);
      if (counter != nullptr) counters.push_back(counter);
    }
    void append(Bucket&& later) {
      for (TableOf& table : later.tables) tables.push_back(std::move(table));
      counters.insert(counters.end(), later.counters.begin(), later.counters.end());
    }
    // Calls `visit(row, counter)` for each row.
    template <class Visit>
    void each_row(const Visit& visit) const {
      auto counter = counters.begin();
      for (const TableOf& table : tables) {
        for (const RowOf& row : table.rows) {
          visit(row, row.step == nullptr ? *counter++ : row.step);
        }
      }
    }
  };
  struct BucketKey {
    uint32_t wave;
    int8_t device;
    bool counts_on_device;
    double step;
    std::array<uint32_t, kMaxScalarStates> scalars;  // their bits, if on the host
    auto tied() const { return std::tie(wave, device, counts_on_device, step); }
    bool operator<(const BucketKey& other) const {
      return std::tie(scalars, wave, device, counts_on_device, step) <
             std::tie(other.scalars, other.wave, other.device, other.counts_on_device, other.step);
    }
  };

  Bucket& bucket_of(const BucketKey& key) {
    const bool is_last = last_ != nullptr && last_->first.tied() == key.tied() &&
                         (kept_.empty() || last_->first.scalars == key.scalars);
    if (is_last) return last_->second;
    const bool is_first = buckets_.empty();
    last_ = &*buckets_.try_emplace(key).first;
    if (is_first) last_->second.tables.back().rows.reserve(num_params_);  // usually the only bucket
    return last_->second;
  }

  // Calls `visit(scalar)` for each scalar state of a row.
  template <class Visit>
  static void each_scalar(const RowOf& row, Visit visit) {
    float* const* const scalars = row.scalars();
    if (scalars == nullptr) return;
    for (size_t i = 0; i < kMaxScalarStates && scalars[i] != nullptr; ++i) visit(scalars[i]);
  }
  // Calls `visit(range)` for the scales of each state that has some.
  template <class Visit>
  static void each_scales(const RowOf& row, Visit visit) {
    if (row.extras == nullptr) return;
    for (const uint8_t* const scales : row.extras->scales) {
      if (scales != nullptr) visit(byte_range(scales, num_groups(row.numel)));
    }
  }

  static bool weight_is_param(const RowOf& row) { return row.data[kWeight] == row.data[kUpdate]; }
  static ByteRange range_of(const float* counter) { return byte_range(counter, sizeof(float)); }
  // A parameter's position in the optimizer, without the shard's number in the high bits.
  static uint32_t position_of(const RowOf& row) { return static_cast<uint32_t>(row.position); }

  // At most a known number of tensors.
  class TensorList {
   public:
    explicit TensorList(size_t capacity) : tensors_(new c10::TensorImpl*[capacity]) {}
    void add(const at::Tensor& tensor) { tensors_[size_++] = tensor.unsafeGetTensorImpl(); }
    size_t size() const { return size_; }
    c10::TensorImpl* const* begin() const { return tensors_.get(); }
    c10::TensorImpl* const* end() const { return tensors_.get() + size_; }

   private:
    std::unique_ptr<c10::TensorImpl*[]> tensors_;
    size_t size_ = 0;
  };

  // The tensors of the rows that one thread has collected.
  struct TouchedTensors {
    TensorList read, modified;
    // `most_modified` of each parameter.
    TouchedTensors(size_t num_params, size_t most_modified)
        : read(num_params), modified(num_params * most_modified) {}
  };

  size_t num_params_;
  std::map<BucketKey, Bucket> buckets_;
  std::pair<const BucketKey, Bucket>* last_ = nullptr;
  std::vector<std::unique_ptr<RowExtras[]>> kept_;
  size_t num_kept_ = 0;  // in the last array
  std::vector<float*> idle_counters_;
  std::vector<StepOperand> copied_;
  c10::SmallVector<TouchedTensors, 1> tensors_;
  std::vector<c10::TensorImpl*> dtensors_;
};

}  // namespace emopt
