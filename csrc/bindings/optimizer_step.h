// An optimizer's step: one call walks the parameters of all groups, their gradients and their
// states, and sweeps them. Nothing is kept between calls, so what has been replaced meanwhile is
// seen.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <list>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/sweep.h"
#include "operand_checks.h"
#include "operators.h"
#include "step_objects.h"
#include "step_overlap.h"

namespace emopt {

// What all groups of a step share.
struct StepNumbers {
  Scalar grad_multiplier, grad_scale, found_inf;
};

// How a group is stepped, beside its rule.
struct GroupOptions {
  Scalar lr;
  ApplyUpdate epilogue;  // but for the numbers
  bool has_masters;
  bool has_remainders;  // of bfloat16 parameters, the masters are those
  bool is_capturable;
  bool must_be_native;      // all of it
  uint32_t first_position;  // of its parameters in the optimizer
  bool makes_all_states;    // also of parameters without a gradient, which count as the others do
  // The steps that the group has counted, where the host knows; parameters' counters follow.
  std::optional<double> count;
};

// A step of the parameters of one group.
//
// Tensors are borrowed, not owned: counting references to them costs more than all else, since
// PyTorch counts some of them in Python, too. As long as other threads do not change parameters,
// gradients and states during the walk, that is safe; to sweep without the GIL, the memory is
// owned.
template <class Rule>
class GroupStep {
 public:
  // The keys of the states, in the order of the rule's.
  using StateNames = std::array<PyObject*, kNumStates<Rule>>;

 private:
  static constexpr size_t kOperands = kNumOperands<Rule, ApplyUpdate>;
  static constexpr size_t kOwn = kOperands - 1;  // the weight
  // Parameters that are walked together, each looking a little further than the last: what they
  // need from memory is then waited for at once, not parameter by parameter. On a Zen 4 core, a
  // step of 1000 parameters of 8 takes 0.96 of the time with 16 that it takes with 32 or 64.
  static constexpr size_t kBatch = 16;

 public:
  // `grads`, if it is not empty, has what to take as the parameters' gradients; None is for one
  // that has no gradient.
  GroupStep(const Rule& rule, GroupOptions options, const StateNames& state_names,
            StepNumbers& numbers, py::tuple params, py::tuple grads)
      : rule_(rule),
        options_(std::move(options)),
        state_names_(state_names),
        numbers_(numbers),
        params_(std::move(params)),
        grads_(std::move(grads)),
        num_params_(params_.size()) {
    TORCH_CHECK_VALUE(grads_.empty() || grads_.size() == num_params_, "there are ", grads_.size(),
                      " gradients for ", num_params_, " parameters");
  }

  size_t num_params() const { return num_params_; }
  bool must_be_native() const { return options_.must_be_native; }

  // Adds the parameters that have a gradient. Returns the indices of those that have to be stepped
  // otherwise: where a state is missing, or a tensor is none that an engine sweeps. And, where it
  // was not known that states may be missing (`is_first`), of those that lack one without having a
  // gradient, if the group makes all states.
  std::vector<Py_ssize_t> take(StateWalk& states, bool is_first) {
    std::vector<Py_ssize_t> left;
    std::array<Candidate, kBatch> batch;
    constexpr auto ahead = static_cast<Py_ssize_t>(kBatch);
    const auto count = static_cast<Py_ssize_t>(num_params_);
    PyObject* const params = params_.ptr();
    PyObject* const grads = grads_.empty() ? nullptr : grads_.ptr();
    read_.resize(num_params_);
    modified_.resize(num_params_ * kOperands);
    for (Py_ssize_t next = 0; next < count;) {
      size_t n = 0;
      for (; n < kBatch && next < count; ++next) {
        PyObject* const object = PyTuple_GET_ITEM(params, next);
        if (next + ahead < count) prefetch(PyTuple_GET_ITEM(params, next + ahead));
        TORCH_CHECK_TYPE(is_tensor(object), "params[", next, "] must be a Tensor");
        batch[n].index = next;
        batch[n].object = object;
        prefetch_tensor(THPVariable_Unpack(object));
        ++n;
      }
      find(batch.data(), n, grads, states);
      for (size_t i = 0; i < n; ++i) {
        if (batch[i].grad->defined()) {
          if (!take(batch[i])) left.push_back(batch[i].index);
        } else if (options_.makes_all_states && !count_idle(batch[i]) && is_first) {
          left.push_back(batch[i].index);
        }
      }
    }
    return left;
  }

  // ---- what shares memory -----------------------------------------------------------------------

  // Whether nothing else refers to the memory of what was taken, which then needs no closer look.
  bool owns_memory_alone() const { return others_ == 0; }

  // As `are_surely_apart` wants it: what is modified, then the gradients.
  template <class Visitor>
  void each_modified(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      for (size_t k = 0; k < kOperands; ++k) {
        if (k == kGrad) continue;
        visitor.start_list();
        for (const Row<kOperands>& row : bucket.table.rows) {
          if (row.numel == 0 || (k == kOwn && row.data[kOwn] == row.data[kUpdate])) continue;
          visitor.modify(range_of(row, k));
        }
      }
      visitor.start_list();
      for (const float* counter : bucket.counters) visitor.modify(range_of(counter));
      for (const Row<kOperands>& row : bucket.table.rows) {
        if (row.step != nullptr) visitor.modify(range_of(row.step));
      }
    }
  }
  template <class Visitor>
  void each_read(Visitor& visitor) const {
    for (const auto& [key, bucket] : buckets_) {
      for (const Row<kOperands>& row : bucket.table.rows) {
        if (row.numel != 0 && row.data[kGrad] != row.data[kUpdate]) {
          visitor.read(range_of(row, kGrad));
        }
      }
    }
    for (const StepOperand& grad : copied_) visitor.read(grad.view.range);
  }

  size_t max_ranges() const { return num_params_ * (kOperands + 1) + copied_.size(); }

  // A parameter's number in the optimizer. (A shard may have a number of its own above it.)
  static uint32_t number_of(const Row<kOperands>& row) {
    return static_cast<uint32_t>(row.position);
  }

  // Those of the parameters that were taken.
  void append_taken(std::vector<StepOperand>& operands) const {
    using Role = StepOperand::Role;
    operands.insert(operands.end(), copied_.begin(), copied_.end());
    for (const auto& [key, bucket] : buckets_) {
      for (size_t i = 0; i < bucket.table.rows.size(); ++i) {
        const Row<kOperands>& row = bucket.table.rows[i];
        const auto add = [&](Role role, ByteRange range) {
          operands.push_back({role, number_of(row), without_gaps(range)});
        };
        add(Role::kCounter, range_of(row.step == nullptr ? bucket.counters[i] : row.step));
        for (size_t k = 0; k < kOperands && row.numel != 0; ++k) {
          if (k == kOwn && row.data[kOwn] == row.data[kUpdate]) continue;
          add(k == kUpdate ? Role::kParam
              : k == kGrad ? Role::kGrad
                           : Role::kState,
              range_of(row, k));
        }
      }
    }
  }

  // Those of parameters that are left. `state` is the optimizer's; `seen` has the parameters of the
  // groups before, and gets this one's.
  void append_left(std::vector<StepOperand>& operands, const std::vector<Py_ssize_t>& left,
                   PyObject* state, std::unordered_set<PyObject*>& seen) const {
    using Role = StepOperand::Role;
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    auto next = left.begin();
    for (Py_ssize_t index = 0; index < static_cast<Py_ssize_t>(num_params_); ++index) {
      PyObject* const param = PyTuple_GET_ITEM(params_.ptr(), index);
      const bool is_first = seen.insert(param).second;
      if (next == left.end() || *next != index) continue;
      ++next;
      const auto add = [&](Role role, PyObject* object) {
        if (object == nullptr || !is_tensor(object)) return;
        const std::optional<Distributed> part = Distributed::from(object);
        const at::Tensor& tensor = THPVariable_Unpack(part ? part->local().ptr() : object);
        const void* const address = address_of(tensor);
        if (address == nullptr) return;
        operands.push_back({role, position_of(index), memory_of_tensor(tensor, address)});
      };
      add(Role::kParam, param);
      Candidate c;
      c.index = index;
      c.object = param;
      find_grad(c, grads_.empty() ? nullptr : grads_.ptr());
      add(Role::kGrad, py::reinterpret_steal<py::object>(THPVariable_Wrap(*c.grad)).ptr());
      if (!is_first) continue;  // with the same states
      PyObject* const own = PyDict_GetItemWithError(state, param);
      if (own == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (own == nullptr || !PyDict_Check(own)) continue;
      const auto find = [&](PyObject* key) { return PyDict_GetItemWithError(own, key); };
      add(Role::kCounter, find(step_key));
      for (PyObject* const name : state_names_) add(Role::kState, find(name));
      if (needs_master(THPVariable_Unpack(param))) add(Role::kState, find(master_key));
    }
  }

  // Sorts what was taken into waves, and adds what has to be left to `left`.
  void settle(const StepOrder& order, std::vector<Py_ssize_t>& left) {
    std::map<BucketKey, Bucket> old;
    old.swap(buckets_);
    last_ = nullptr;
    for (const auto& [old_key, old_bucket] : old) {
      for (size_t i = 0; i < old_bucket.table.rows.size(); ++i) {
        const Row<kOperands>& row = old_bucket.table.rows[i];
        if (order.is_left(number_of(row))) {
          left.push_back(number_of(row) - options_.first_position);
          continue;
        }
        BucketKey key = old_key;
        key.wave = order.wave(number_of(row));
        Bucket& bucket = bucket_of(key);
        bucket.table.append(row);
        if (row.step == nullptr) bucket.counters.push_back(old_bucket.counters[i]);
      }
    }
    std::sort(left.begin(), left.end());
  }

  uint32_t position_of(Py_ssize_t index) const {
    return options_.first_position + static_cast<uint32_t>(index);
  }

  int64_t numel() const {
    int64_t numel = 0;
    for (const auto& [key, bucket] : buckets_) numel += bucket.table.numel;
    return numel;
  }
  bool any_on_device() const {
    return std::any_of(buckets_.begin(), buckets_.end(),
                       [](const auto& entry) { return entry.second.table.any_on_device; });
  }

  // Tells autograd what is about to be modified.
  void bump_versions() {
    for (size_t i = 0; i < num_modified_; ++i) modified_[i]->bump_version();
    for (c10::TensorImpl* const whole : wholes_) whole->bump_version();
  }

  // What keeps all memory alive.
  void own(std::vector<c10::intrusive_ptr<c10::StorageImpl>>& owned) const {
    const auto own_memory = [&](c10::TensorImpl* tensor) {
      c10::StorageImpl* const storage = tensor->unsafe_storage().unsafeGetStorageImpl();
      owned.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    };
    std::for_each_n(read_.begin(), num_read_, own_memory);
    std::for_each_n(modified_.begin(), num_modified_, own_memory);
  }

  // Does the step of all that was taken, of one wave. Needs no GIL.
  void sweep(uint32_t wave) {
    for (auto& [key, bucket] : buckets_) {
      if (key.wave != wave) continue;
      ApplyUpdate epilogue = options_.epilogue;
      epilogue.lr = options_.lr.on(key.device);
      epilogue.grad_multiplier = numbers_.grad_multiplier.on(key.device);
      epilogue.grad_scale = numbers_.grad_scale.on(key.device);
      epilogue.found_inf = numbers_.found_inf.on(key.device);
      emopt::sweep(rule_, {key.step}, epilogue, bucket.table);
      for (float* counter : bucket.counters) *counter = static_cast<float>(key.step);
    }
    for (float* counter : idle_counters_) *counter = static_cast<float>(*options_.count + 1.0);
  }

 private:
  struct Candidate {
    Py_ssize_t index;
    PyObject* object;
    PyObject* given_grad;  // null where the gradient is the parameter's
    const at::Tensor* grad;
    PyObject* own;  // its states
    PyObject* step_object;
    std::array<PyObject*, kNumStates<Rule> + 1> states;  // and the master
    bool has_master;
    bool is_distributed;
    bool is_complete;  // whether there is something of everything
    uintptr_t others;  // not zero where something else may refer to its states
    const at::Tensor* step;
    std::array<const at::Tensor*, kOperands> operands;
  };

  // Rows that share a step: of one device, and one number that the host counts.
  struct Bucket {
    Table<kOperands> table;
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

  static ByteRange range_of(const Row<kOperands>& row, size_t k) {
    return byte_range(row.data[k], row.numel * size_of(row.dtype[k]));
  }
  static ByteRange range_of(const float* counter) { return byte_range(counter, sizeof(float)); }

  // Null where a tensor has no memory that could be looked at.
  static const void* address_of(const at::Tensor& tensor) {
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    if (impl.layout() != at::kStrided || impl.key_set().has(c10::DispatchKey::Python) ||
        tensor.numel() == 0 || !impl.has_storage()) {
      return nullptr;
    }
    const void* const base = impl.unsafe_storage().unsafeGetStorageImpl()->data();
    if (base == nullptr) return nullptr;
    return static_cast<const char*>(base) +
           tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  }

  // ---- the walk ---------------------------------------------------------------------------------

  static void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    static_cast<void>(address);
#endif
  }
  static void prefetch_lines(const void* address, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(address) + i);
  }
  static void prefetch_tensor(const at::Tensor& tensor) {
    prefetch_lines(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
  }
  static void prefetch_memory(const at::Tensor& tensor) {
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    prefetch_lines(impl.unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    // The counter of versions: the one pointer in there.
    void* version = nullptr;
    static_assert(sizeof(c10::VariableVersion) == sizeof(version));
    std::memcpy(&version, &impl.version_counter(), sizeof(version));
    prefetch(version);
  }

  // Finds what belongs to each parameter.
  void find(Candidate* batch, size_t n, PyObject* grads, StateWalk& states) {
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    for (size_t i = 0; i < n; ++i) {
      prefetch(THPVariable_Unpack(batch[i].object).unsafeGetTensorImpl()->autograd_meta());
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      find_grad(c, grads);
      c.own = nullptr;
      c.is_complete = false;
      if (c.grad->defined()) {
        prefetch_tensor(*c.grad);
      } else if (!options_.makes_all_states) {
        continue;
      }
      c.own = states.find(c.object);
      if (c.own != nullptr) prefetch(c.own);
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      if (c.own == nullptr) continue;
      if (PyDict_Check(c.own)) {
        prefetch_lines(reinterpret_cast<PyDictObject*>(c.own)->ma_keys, 192);
      } else {
        c.own = nullptr;
      }
    }
    for (size_t i = 0; i < n; ++i) {
      Candidate& c = batch[i];
      c.states.fill(nullptr);
      if (c.own == nullptr) continue;
      FieldWalk fields(c.own);
      c.step_object = fields.find(step_key);
      for (size_t s = 0; s < kNumStates<Rule>; ++s) c.states[s] = fields.find(state_names_[s]);
      c.has_master = needs_master(THPVariable_Unpack(c.object));
      if (c.has_master) c.states.back() = fields.find(master_key);
      prefetch(c.step_object);
      for (PyObject* const state : c.states) prefetch(state);
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i].own != nullptr && batch[i].grad->defined()) unwrap(batch[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      if (!batch[i].is_complete) continue;
      prefetch_memory(*batch[i].step);
      for (const at::Tensor* operand : batch[i].operands) prefetch_memory(*operand);
    }
  }

  static void find_grad(Candidate& c, PyObject* grads) {
    c.given_grad = grads == nullptr ? nullptr : PyTuple_GET_ITEM(grads, c.index);
    if (c.given_grad == nullptr) {
      c.grad = &THPVariable_Unpack(c.object).unsafeGetTensorImpl()->grad();
    } else if (c.given_grad == Py_None) {
      static const at::Tensor none;
      c.grad = &none;
    } else {
      TORCH_CHECK_TYPE(THPVariable_Check(c.given_grad), "the gradient given for params[", c.index,
                       "] must be a Tensor");
      c.grad = &THPVariable_Unpack(c.given_grad);
    }
  }

  // From Python's objects to tensors; of DTensors, to their parts here.
  void unwrap(Candidate& c) {
    std::optional<Distributed> whole;
    if (!is_plain(THPVariable_Unpack(c.object))) whole = Distributed::from(c.object);
    if (whole && alive_.empty()) {  // mostly all others are, too
      alive_.reserve(num_params_ * (kOperands + 1));
      wholes_.reserve(num_params_ * (kNumStates<Rule> + 1));
    }
    // A gradient that is given may be a parameter; a dictionary, that of two parameters.
    c.others = whole || c.given_grad != nullptr || Py_REFCNT(c.own) != 1;
    const auto tensor_of = [&](PyObject* object) -> const at::Tensor* {
      if (object == nullptr || !is_tensor(object)) return nullptr;
      if (whole) {
        std::optional<Distributed> part = Distributed::from(object);
        if (!part || !part->is_placed_as(*whole)) return nullptr;
        object = part->local().ptr();
        alive_.push_back(part->local());
      }
      const at::Tensor& tensor = THPVariable_Unpack(object);
      prefetch_tensor(tensor);
      return &tensor;
    };
    c.operands[kUpdate] = c.operands[kOwn] = tensor_of(c.object);
    c.operands[kGrad] = c.grad;
    if (whole && c.given_grad != nullptr) {
      c.operands[kGrad] = tensor_of(c.given_grad);
    } else if (whole) {
      alive_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(*c.grad)));
      c.operands[kGrad] = tensor_of(alive_.back().ptr());
    }
    const auto state_of = [&](PyObject* object) {
      c.others |= object == nullptr || Py_REFCNT(object) != 1;
      return tensor_of(object);
    };
    for (size_t s = 0; s < kNumStates<Rule>; ++s) {
      c.operands[kFirstState + s] = state_of(c.states[s]);
    }
    if (c.has_master) c.operands[kOwn] = state_of(c.states.back());
    c.is_distributed = whole.has_value();
    whole.reset();  // a counter is a tensor of each process
    c.step = state_of(c.step_object);
    c.is_complete = c.step != nullptr;
    for (const at::Tensor* operand : c.operands) c.is_complete &= operand != nullptr;
  }

  bool needs_master(const at::Tensor& param) const {
    return options_.has_masters &&
           (param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf);
  }

  // ---- one parameter ----------------------------------------------------------------------------

  // Counts for a parameter without a gradient. False where a state is missing.
  bool count_idle(const Candidate& c) {
    const auto is_there = [](PyObject* state) { return state != nullptr && state != Py_None; };
    if (c.own == nullptr || c.step_object == nullptr || !is_tensor(c.step_object)) return false;
    if (!std::all_of(c.states.begin(), c.states.end() - 1, is_there)) return false;
    if (c.has_master && !is_there(c.states.back())) return false;
    if (!options_.count) return true;  // on a device
    const at::Tensor& step = THPVariable_Unpack(c.step_object);
    if (!is_plain(step) || step.scalar_type() != at::kFloat || step.numel() != 1) return false;
    if (!step.is_cpu()) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    // Whether this step is skipped, only a device may know.
    if (counter == nullptr || numbers_.found_inf.is_on_device()) return counter != nullptr;
    idle_counters_.push_back(counter);
    modified_[num_modified_++] = step.unsafeGetTensorImpl();
    return true;
  }

  // False, with nothing added, where it has to be stepped otherwise.
  bool take(Candidate& c) {
    if (!c.is_complete) return false;
    if (c.operands[kUpdate]->is_complex() && !make_real(c)) return false;
    const at::Tensor& param = *c.operands[kUpdate];
    if (!is_plain(param) || !is_supported_dtype(param.scalar_type())) return false;
#if !EMOPT_CUDA
    if (!param.is_cpu()) return false;
#endif
    const bool is_contiguous = param.is_contiguous();
    if (!is_contiguous && !param.is_non_overlapping_and_dense()) return false;
    const auto lies_alike = [&](const at::Tensor& tensor) {
      return is_contiguous ? tensor.is_contiguous() : same_strides(tensor, param);
    };
    uintptr_t others = 0;  // not zero where something else may refer to memory; without branches
    Row<kOperands> row;
    row.device = param.is_cuda() ? param.get_device() : kHost;
    row.position = options_.first_position + static_cast<uint64_t>(c.index);
    if (c.is_distributed && options_.epilogue.is_stochastic) {
      const auto [shard, first_index] = shard_place(c.object);
      row.position |= shard << 32;
      row.first_index = first_index;
    }
    row.scale = 1.0;
    row.numel = param.numel();
    row.compute = DType::kFloat32;
    const bool is_halved =
        c.has_master && options_.has_remainders && param.scalar_type() == at::kBFloat16;
    if constexpr (kHasShapeScale<Rule>) {
      if (rule_.use_shape_scaling) {
        // Of the whole parameter, of which this may be a part.
        const at::Tensor& whole = THPVariable_Unpack(c.object);
        if (whole.dim() != 2) return false;  // the plain path has the error for it
        row.scale = Rule::shape_scale(whole.size(0), whole.size(1));
      }
    }
    for (size_t k = 0; k < kOperands; ++k) {
      const at::Tensor* operand = c.operands[k];
      if (k == kOwn && !c.has_master) {
        row.dtype[k] = row.dtype[kUpdate];
        row.data[k] = row.data[kUpdate];
      } else {
        const bool is_remainder = is_halved && k == kOwn;
        if (is_remainder && operand->scalar_type() != at::kShort) return false;
        const bool is_master = c.has_master && k == kOwn;
        if (is_master && !is_remainder && operand->scalar_type() != at::kFloat) return false;
        // Not by a pointer to the right check, which could not be inlined.
        if (k != kUpdate &&
            !(is_remainder ? is_beside(*operand, param) : is_alike(*operand, param))) {
          return false;
        }
        if (k != kUpdate &&
            (!lies_alike(*operand) || (k == kGrad && overlaps_partly(*operand, row)))) {
          if (k != kGrad) return false;
          // A copy of the gradient that lies in memory as the parameter does.
          keep_copied(c);
          owned_.push_back(at::empty_like(param, operand->options()).copy_(*operand));
          operand = c.operands[k] = &owned_.back();
        }
        row.dtype[k] = is_remainder                ? DType::kLowHalf
                       : is_halved && k == kUpdate ? DType::kHighHalf
                                                   : to_dtype(operand->scalar_type());
        others |= other_owners(*operand, deleter_);
        if (k != kGrad) others |= other_users(*operand);
        row.data[k] = memory_of(*operand, row.dtype[k], k != kGrad);
        prefetch(row.data[k]);
        if (row.data[k] == nullptr && row.numel != 0) return false;
        // From here on, a weight at the parameter's address is the parameter.
        TORCH_CHECK_VALUE(k != kOwn || row.data[k] != row.data[kUpdate] || row.numel == 0,
                          kSharedState);
        // What the CPU takes, a GPU does not.
        if (row.device != kHost && !is_aligned(row.data[k], row.dtype[k])) return false;
      }
      if (is_read(static_cast<int>(k)) && row.dtype[k] == DType::kFloat64) {
        row.compute = DType::kFloat64;
      }
    }
    if (is_halved && row.device != kHost && row.compute == DType::kFloat64) return false;
    return append(c, row, others);
  }

  // Whether a gradient that is laid out as its parameter shares memory with it, but not exactly.
  static bool overlaps_partly(const at::Tensor& grad, const Row<kOperands>& row) {
    const DType dtype = to_dtype(grad.scalar_type());
    const ByteRange own = range_of(row, kUpdate);
    const ByteRange other = byte_range(memory_of(grad, dtype, false), row.numel * size_of(dtype));
    if (own.begin >= other.end || other.begin >= own.end) return false;
    return own.begin != other.begin || own.end != other.end;
  }

  bool append(const Candidate& c, Row<kOperands>& row, uintptr_t others) {
    const at::Tensor& step = *c.step;
    const bool is_counter = is_plain(step) && step.scalar_type() == at::kFloat && step.numel() == 1;
    const bool counts_here = step.is_cpu();
    if (options_.count && !counts_here) return false;
    if (!is_counter || !(counts_here || step.get_device() == row.device)) return false;
    // Numbers that only a device knows need a counter there, and are of no use elsewhere.
    const bool must_count_there = options_.is_capturable || numbers_.found_inf.is_on_device();
    if (row.device == kHost ? needs_device() : counts_here && must_count_there) return false;
    auto* const counter = static_cast<float*>(memory_of(step, DType::kFloat32, true));
    if (counter == nullptr) return false;
    BucketKey key{0, row.device, !counts_here, 1.0};
    if (counts_here) {
      key.step = options_.count ? *options_.count + 1.0 : static_cast<double>(*counter + 1.0f);
      // A NaN has no place among keys, and infinity is no count.
      if (!(key.step >= 1.0 && std::isfinite(key.step))) return false;
    } else {
      row.step = counter;
    }
    Bucket& bucket = bucket_of(key);
    bucket.table.append(row);
    if (counts_here) bucket.counters.push_back(counter);
    read_[num_read_++] = c.operands[kGrad]->unsafeGetTensorImpl();
    modified_[num_modified_++] = step.unsafeGetTensorImpl();
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kGrad || (k == kOwn && c.operands[k] == c.operands[kUpdate])) continue;
      modified_[num_modified_++] = c.operands[k]->unsafeGetTensorImpl();
    }
    if (c.is_distributed) keep_wholes(c);
    others_ |= others | c.others | other_owners(step, deleter_) | other_users(step);
    return true;
  }

  // A DTensor has a version counter beside that of its part.
  void keep_wholes(const Candidate& c) {
    const auto keep = [&](PyObject* object) {
      c10::TensorImpl* const impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
      if (!impl->is_inference()) wholes_.push_back(impl);
    };
    keep(c.object);
    for (PyObject* const state : c.states) {
      if (state != nullptr) keep(state);
    }
  }

  // A gradient of which a copy is swept shares memory all the same.
  void keep_copied(const Candidate& c) {
    const at::Tensor& grad = *c.operands[kGrad];
    const void* const address = address_of(grad);
    if (address == nullptr) return;
    copied_.push_back(
        {StepOperand::Role::kGrad, position_of(c.index), memory_of_tensor(grad, address), true});
    others_ |= other_owners(grad, deleter_);
  }

  bool needs_device() const {
    return options_.lr.is_on_device() || numbers_.grad_multiplier.is_on_device() ||
           numbers_.grad_scale.is_on_device() || numbers_.found_inf.is_on_device();
  }

  // Complex numbers are swept as pairs of real ones.
  bool make_real(Candidate& c) {
    const bool is_own_weight = c.operands[kOwn] == c.operands[kUpdate];
    for (size_t k = 0; k < kOperands; ++k) {
      if (k == kOwn && is_own_weight) {
        c.operands[k] = c.operands[kUpdate];
        continue;
      }
      const at::Tensor& tensor = *c.operands[k];
      // What is conjugated lazily does not lie in memory as its values are.
      const bool is_dense = tensor.is_complex() && tensor.layout() == at::kStrided;
      if (!is_dense || (tensor.is_conj() && k != kGrad)) return false;
      if (tensor.is_conj()) keep_copied(c);
      owned_.push_back(at::view_as_real(tensor.resolve_conj()));
      c.operands[k] = &owned_.back();
    }
    return true;
  }

  Bucket& bucket_of(const BucketKey& key) {
    if (last_ != nullptr && last_->first.tied() == key.tied()) return last_->second;
    const bool is_first = buckets_.empty();
    last_ = &*buckets_.try_emplace(key).first;
    if (is_first) last_->second.table.rows.reserve(num_params_);  // mostly there is no other
    return last_->second;
  }

  Rule rule_;
  GroupOptions options_;
  StateNames state_names_;
  StepNumbers& numbers_;
  py::tuple params_;
  py::tuple grads_;
  std::map<BucketKey, Bucket> buckets_;
  std::pair<const BucketKey, Bucket>* last_ = nullptr;
  std::vector<float*> idle_counters_;
  size_t num_params_;
  std::list<at::Tensor> owned_;                    // tensors that were made here
  std::vector<StepOperand> copied_;                // the gradients of which it has copies
  std::vector<py::object> alive_;                  // objects that nothing else may hold
  std::vector<c10::TensorImpl*> read_, modified_;  // of their full size, filled up to
  size_t num_read_ = 0, num_modified_ = 0;         // these
  std::vector<c10::TensorImpl*> wholes_;           // the DTensors among what is modified
  c10::DeleterFnPtr deleter_ = c10::GetCPUAllocator()->raw_deleter();
  uintptr_t others_ = deleter_ == nullptr;  // not zero where something else refers to memory
};

}  // namespace emopt
