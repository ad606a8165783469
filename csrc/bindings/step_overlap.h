// Memory that the tensors of an optimizer's step share: states must not share any; parameters that
// do are updated one after the other, in their order.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "memory_overlap.h"

namespace emopt {

// The caller finds the tensors and raises a more specific error.
constexpr const char* kSharedState = "a state shares memory with another tensor of its optimizer";

// A tensor of a step, with its parameter's position in the optimizer.
struct StepOperand {
  // Scalar states are counters here: a shared one is replaced by separate ones, too.
  enum class Role : uint8_t { kParam, kGrad, kState, kCounter };

  Role role;
  uint32_t position;
  MemoryView view;
  bool is_copied = false;  // a gradient that was copied before the step

  bool is_modified() const { return role != Role::kGrad; }
};

// The order in which parameters that share memory are updated.
class StepOrder {
 public:
  // `is_remaining` tells, by position, which parameters are left to the fallback, which runs after
  // the native step.
  StepOrder(std::vector<StepOperand> operands, std::vector<char> is_remaining)
      : operands_(std::move(operands)),
        is_remaining_(std::move(is_remaining)),
        waves_(is_remaining_.size()) {
    std::vector<UsedMemory> used;
    used.reserve(operands_.size());
    for (const StepOperand& operand : operands_) {
      used.push_back({operand.view, operand.is_modified()});
    }
    find_sharing(used, [&](size_t i, size_t j, Sharing) { consider(operands_[i], operands_[j]); });
    std::sort(edges_.begin(), edges_.end());
    for (const auto& [later, earlier] : edges_) {
      if (is_remaining_[earlier]) {
        is_remaining_[later] = true;
      } else {
        waves_[later] = std::max(waves_[later], waves_[earlier] + 1);
      }
    }
  }

  bool is_remaining(uint32_t position) const { return is_remaining_[position] != 0; }
  // Parameters of one wave share no memory; the waves are updated one after the other.
  uint32_t wave(uint32_t position) const { return waves_[position]; }
  uint32_t num_waves() const {
    return waves_.empty() ? 1 : *std::max_element(waves_.begin(), waves_.end()) + 1;
  }

 private:
  using Role = StepOperand::Role;

  static bool is_stepped(Role role) { return role == Role::kParam || role == Role::kGrad; }

  void consider(const StepOperand& a, const StepOperand& b) {
    const auto [earlier, later] = std::minmax(a.position, b.position);
    if (is_stepped(a.role) && is_stepped(b.role)) {
      if (earlier == later) return;
      edges_.emplace_back(later, earlier);
      // A copy made before the step lacks what the earlier parameter's update writes.
      if ((a.position == later ? a : b).is_copied) is_remaining_[later] = true;
      return;
    }
    if (a.role == Role::kCounter && b.role == Role::kCounter &&
        a.view.range.begin == b.view.range.begin) {
      is_remaining_[later] = true;  // until it has a separate one
      return;
    }
    TORCH_CHECK_VALUE(false, kSharedState);
  }

  std::vector<StepOperand> operands_;
  std::vector<char> is_remaining_;
  std::vector<uint32_t> waves_;
  std::vector<std::pair<uint32_t, uint32_t>> edges_;  // positions: the later one, the earlier one
};

}  // namespace emopt
