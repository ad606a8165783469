// Walks over a group's parameters and finds the gradient and the states of each.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstring>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../engine/operands.h"
#include "../engine/prefetch.h"
#include "operand_checks.h"
#include "python_objects.h"
#include "step_options.h"
#include "tensor_memory.h"

namespace emopt {

// Finds parameters' states in the optimizer's dictionary, which usually has the parameters' order.
class StateLookup {
 public:
  explicit StateLookup(PyObject* state) : cursor_(state) {}

  // Whether all were found in the dictionary's order.
  bool is_in_order() const { return cursor_.is_in_order(); }

  // Null if there is none, or if it was found before: one call cannot update a parameter twice.
  PyObject* find(PyObject* param) {
    PyObject* const state = cursor_.find(param);
    if (cursor_.is_in_order()) {
      found_.push_back(param);
      return state;
    }
    if (seen_.empty()) seen_.insert(found_.begin(), found_.end());
    return seen_.insert(param).second ? state : nullptr;
  }

  // Null if there is none after the last one found.
  PyObject* find_in_order(PyObject* param) {
    PyObject* const state = cursor_.find_in_order(param);
    if (state == nullptr) return nullptr;
    if (found_.empty()) first_ = cursor_.next() - 1;
    found_.push_back(param);
    return state;
  }

  // A lookup, in order only, for parameters of which `param` is the first, probably `count` entries
  // after the last one found.
  StateLookup ahead(PyObject* param, size_t count) const {
    StateLookup result(cursor_);
    result.cursor_.skip_to(param, static_cast<Py_ssize_t>(count));
    return result;
  }

  bool has_found() const { return !found_.empty(); }

  // Whether all that it has found is later in the dictionary than all that `other` has.
  bool is_after(const StateLookup& other) const {
    return found_.empty() || first_ >= other.cursor_.next();
  }

  // Goes on after what another lookup, which is after this one, has found.
  void follow(const StateLookup& later) {
    if (later.found_.empty()) return;
    cursor_ = later.cursor_;
    found_.insert(found_.end(), later.found_.begin(), later.found_.end());
  }

 private:
  explicit StateLookup(const DictCursor& cursor) : cursor_(cursor) {}

  DictCursor cursor_;
  std::vector<PyObject*> found_;  // in order
  Py_ssize_t first_ = 0;          // the entry of the first one found
  std::unordered_set<PyObject*> seen_;
};

// The scalar states of a parameter, as many as the rule has.
struct CandidateScalars {
  std::array<PyObject*, kMaxScalarStates> objects;
  std::array<const at::Tensor*, kMaxScalarStates> tensors;
};

// How a state may be stored in 8 bits: the format, and the key of its scales.
struct StateCoding {
  DType dtype;
  PyObject* scale_key;  // null if the rule does not allow it
};

// A parameter, its gradient and its states.
template <int kStates>
struct Candidate {
  static constexpr size_t kOperands = kNumOperands<kStates, ApplyUpdate>;

  Py_ssize_t index;
  PyObject* param;
  PyObject* given_grad;  // null if the gradient is `param.grad`
  const at::Tensor* grad;
  PyObject* state;  // its dictionary
  PyObject* step_object;
  std::array<PyObject*, size_t{kStates} + 1> state_objects;  // the master weight comes last
  bool has_master;
  bool is_distributed;
  bool is_complete;  // whether all operands were found
  uintptr_t others;  // nonzero if anything else may refer to its states
  const at::Tensor* step;
  std::array<const at::Tensor*, kOperands> operands;
  CandidateScalars* scalars;
};

template <int kStates>
class CandidateWalk {
 public:
  using CandidateOf = Candidate<kStates>;
  // The keys of the states, in the rule's order.
  using StateNames = std::array<PyObject*, kStates>;
  // Those of the scalar states.
  using ScalarNames = c10::SmallVector<PyObject*, kMaxScalarStates>;
  using StateCodes = std::array<StateCoding, kStates>;

  // `grads` is empty, or has a gradient or None for each parameter, instead of `param.grad`.
  CandidateWalk(const GroupOptions& options, const StateNames& state_names,
                ScalarNames scalar_names, const StateCodes& codes, py::tuple params,
                py::tuple grads)
      : has_masters_(options.has_masters),
        makes_all_states_(options.makes_all_states),
        state_names_(state_names),
        scalar_names_(std::move(scalar_names)),
        codes_(codes),
        params_(std::move(params)),
        grads_(std::move(grads)) {
    static PyObject* const step_key = interned("step");
    static PyObject* const master_key = interned("master_param");
    step_key_ = step_key;
    master_key_ = master_key;
    TORCH_CHECK_VALUE(grads_.empty() || grads_.size() == params_.size(), "there are ",
                      grads_.size(), " gradients for ", params_.size(), " parameters");
  }

  size_t num_params() const { return params_.size(); }
  PyObject* param(Py_ssize_t index) const { return PyTuple_GET_ITEM(params_.ptr(), index); }
  const StateNames& state_names() const { return state_names_; }
  const ScalarNames& scalar_names() const { return scalar_names_; }
  const StateCodes& codes() const { return codes_; }

  // Calls `visit(candidate)` for each parameter, in order.
  template <class Visit>
  void each(StateLookup& states, const Visit& visit) {
    walk<kWithPython>(0, num_params(), states, [&](CandidateOf& c) {
      visit(c);
      return true;
    });
  }

  // The same for the parameters from `begin` to `end`, until `visit` returns false. Any thread may
  // call this while another one holds the GIL: no Python code runs and no reference is counted.
  // False if that, or `visit`, was in the way. What is thrown has no Python state.
  template <class Visit>
  bool each_without_python(size_t begin, size_t end, StateLookup& states, const Visit& visit) {
    return grads_.empty() && walk<kWithoutPython>(begin, end, states, visit);
  }

  void find_grad(CandidateOf& c) const {
    c.given_grad = grads_.empty() ? nullptr : PyTuple_GET_ITEM(grads_.ptr(), c.index);
    if (c.given_grad == nullptr) {
      c.grad = &THPVariable_Unpack(c.param).unsafeGetTensorImpl()->grad();
    } else if (c.given_grad == Py_None) {
      static const at::Tensor none;
      c.grad = &none;
    } else {
      TORCH_CHECK_TYPE(THPVariable_Check(c.given_grad), "the gradient given for params[", c.index,
                       "] must be a Tensor");
      c.grad = &THPVariable_Unpack(c.given_grad);
    }
  }

  bool needs_master(const at::Tensor& param) const {
    return has_masters_ &&
           (param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf);
  }

 private:
  enum Mode : bool { kWithoutPython, kWithPython };

  template <Mode kMode, class Visit>
  bool walk(size_t begin, size_t end, StateLookup& states, const Visit& visit) {
    std::array<CandidateOf, kBatch> batch;
    std::array<CandidateScalars, kBatch> scalars;
    for (size_t next = begin; next < end;) {
      size_t n = 0;
      for (; n < kBatch && next < end; ++next) {
        const auto index = static_cast<Py_ssize_t>(next);
        if (next + kBatch < end) {
          prefetch_ends(param(index + static_cast<Py_ssize_t>(kBatch)), sizeof(THPVariable));
        }
        const bool is_param = is_tensor(param(index));
        if (kMode == kWithoutPython && !is_param) return false;
        TORCH_CHECK_TYPE(is_param, "params[", index, "] must be a Tensor");
        batch[n].index = index;
        batch[n].param = param(index);
        batch[n].scalars = &scalars[n];
        prefetch_tensor(THPVariable_Unpack(batch[n].param));
        ++n;
      }
      if (!find<kMode>(batch.data(), n, states)) return false;
      for (size_t i = 0; i < n; ++i) {
        if (!visit(batch[i])) return false;
      }
    }
    return true;
  }

  // Parameters are walked in batches, so that their cache misses overlap: each loop prefetches what
  // the next one reads. On a Zen 4 core, a step of 1000 parameters of 8 elements takes 0.96 times
  // as long with batches of 16 as with 32 or 64.
  static constexpr size_t kBatch = 16;
  static constexpr size_t kWeight = CandidateOf::kOperands - 1;
  // What is read of the keys of a dictionary with a few entries.
  static constexpr size_t kKeysBytes = 128;

  static void prefetch_tensor(const at::Tensor& tensor) {
    prefetch_lines(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
  }
  static void prefetch_memory(const at::Tensor& tensor) {
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    prefetch_lines(impl.unsafe_storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
    // The pointer to the version counter has no accessor. With cold caches, prefetching it makes a
    // step of 1000 parameters of 8 elements take 0.96 to 0.99 times as long.
    void* version = nullptr;
    static_assert(sizeof(c10::VariableVersion) == sizeof(version));
    std::memcpy(&version, &impl.version_counter(), sizeof(version));
    prefetch(version);
  }

  // Finds the gradient and the states of each parameter.
  template <Mode kMode>
  bool find(CandidateOf* batch, size_t n, StateLookup& states) {
    const size_t num_scalars = scalar_names_.size();
    for (size_t i = 0; i < n; ++i) {
      // The gradient is among the first members.
      prefetch_ends(THPVariable_Unpack(batch[i].param).unsafeGetTensorImpl()->autograd_meta(), 48);
    }
    for (size_t i = 0; i < n; ++i) {
      CandidateOf& c = batch[i];
      find_grad(c);
      c.state = nullptr;
      c.is_complete = false;
      if (c.grad->defined()) {
        prefetch_tensor(*c.grad);
      } else if (!makes_all_states_) {
        continue;
      }
      if constexpr (kMode == kWithPython) {
        c.state = states.find(c.param);
      } else {
        c.state = states.find_in_order(c.param);
        if (c.state == nullptr || !is_plain(THPVariable_Unpack(c.param))) return false;
      }
      if (c.state != nullptr) prefetch_ends(c.state, sizeof(PyDictObject));
    }
    for (size_t i = 0; i < n; ++i) {
      CandidateOf& c = batch[i];
      if (c.state == nullptr) continue;
      if (PyDict_Check(c.state)) {
        prefetch_lines(reinterpret_cast<PyDictObject*>(c.state)->ma_keys, kKeysBytes);
      } else {
        c.state = nullptr;
      }
    }
    for (size_t i = 0; i < n; ++i) {
      CandidateOf& c = batch[i];
      c.state_objects.fill(nullptr);
      if (c.state == nullptr) continue;
      FieldCursor fields(c.state);
      bool are_all_found = true;
      const auto find_field = [&](PyObject* key) {
        PyObject* const value = fields.find(key);
        if (kMode == kWithPython && value == nullptr) return find_item(c.state, key);
        are_all_found &= value != nullptr;
        return value;
      };
      c.step_object = find_field(step_key_);
      for (size_t s = 0; s < kStates; ++s) c.state_objects[s] = find_field(state_names_[s]);
      for (size_t k = 0; k < num_scalars; ++k) c.scalars->objects[k] = find_field(scalar_names_[k]);
      c.has_master = needs_master(THPVariable_Unpack(c.param));
      if (c.has_master) c.state_objects.back() = find_field(master_key_);
      if (!are_all_found) return false;  // only without Python
      prefetch_ends(c.step_object, sizeof(THPVariable));
      for (PyObject* const object : c.state_objects) prefetch_ends(object, sizeof(THPVariable));
      for (size_t k = 0; k < num_scalars; ++k) {
        prefetch_ends(c.scalars->objects[k], sizeof(THPVariable));
      }
    }
    for (size_t i = 0; i < n; ++i) {
      if (batch[i].state != nullptr && batch[i].grad->defined()) unwrap(batch[i], num_scalars);
    }
    for (size_t i = 0; i < n; ++i) {
      if (!batch[i].is_complete) continue;
      prefetch_memory(*batch[i].step);
      for (size_t k = 0; k < CandidateOf::kOperands; ++k) prefetch_memory(*batch[i].operands[k]);
      for (size_t k = 0; k < num_scalars; ++k) prefetch_memory(*batch[i].scalars->tensors[k]);
    }
    return true;
  }

  // Finds the tensors of the Python objects; the local tensors of DTensors.
  void unwrap(CandidateOf& c, size_t num_scalars) {
    std::optional<DTensorView> dtensor;
    if (!is_plain(THPVariable_Unpack(c.param))) dtensor = DTensorView::from(c.param);
    if (dtensor && alive_.empty()) {  // usually all are DTensors
      alive_.reserve(num_params() * (CandidateOf::kOperands + 1 + scalar_names_.size()));
    }
    // A given gradient may be a parameter; two parameters may share one dictionary.
    c.others = dtensor || c.given_grad != nullptr || Py_REFCNT(c.state) != 1;
    const auto tensor_of = [&](PyObject* object) -> const at::Tensor* {
      if (object == nullptr || !is_tensor(object)) return nullptr;
      if (dtensor) {
        std::optional<DTensorView> part = DTensorView::from(object);
        if (!part || !part->is_placed_as(*dtensor)) return nullptr;
        object = part->local().ptr();
        alive_.push_back(part->local());
      }
      const at::Tensor& tensor = THPVariable_Unpack(object);
      prefetch_tensor(tensor);
      return &tensor;
    };
    c.operands[kUpdate] = c.operands[kWeight] = tensor_of(c.param);
    c.operands[kGrad] = c.grad;
    if (dtensor && c.given_grad != nullptr) {
      c.operands[kGrad] = tensor_of(c.given_grad);
    } else if (dtensor) {
      alive_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(*c.grad)));
      c.operands[kGrad] = tensor_of(alive_.back().ptr());
    }
    const auto state_of = [&](PyObject* object) {
      c.others |= object == nullptr || Py_REFCNT(object) != 1;
      return tensor_of(object);
    };
    for (size_t s = 0; s < kStates; ++s) {
      c.operands[kFirstState + s] = state_of(c.state_objects[s]);
    }
    if (c.has_master) c.operands[kWeight] = state_of(c.state_objects.back());
    c.is_distributed = dtensor.has_value();
    dtensor.reset();  // numbers are not DTensors
    c.step = state_of(c.step_object);
    c.is_complete = c.step != nullptr;
    for (size_t i = 0; i < num_scalars; ++i) {
      c.scalars->tensors[i] = state_of(c.scalars->objects[i]);
      c.is_complete &= c.scalars->tensors[i] != nullptr;
    }
    for (const at::Tensor* operand : c.operands) c.is_complete &= operand != nullptr;
  }

  // Initialized by the thread that makes the walk.
  PyObject* step_key_;
  PyObject* master_key_;
  bool has_masters_, makes_all_states_;
  StateNames state_names_;
  ScalarNames scalar_names_;
  StateCodes codes_;
  py::tuple params_;
  py::tuple grads_;
  std::vector<py::object> alive_;  // objects that nothing else is sure to keep alive
};

}  // namespace emopt
