// Bias corrections and warm-up schedules, computed once per step, in double.
#pragma once

#include "rule.h"

namespace emopt {

// 1 - beta^step, by binary powering of the complement: with c(t) = 1 - beta^t,
//
//   c(s + t) = c(s) + (1 - c(s)) c(t)
//
// has only positive terms, so nothing cancels: the relative error is a few 2^-53, while that of
// 1 - pow(beta, step) is 1 / (1 - beta) times as large in the first steps. All operations are
// correctly rounded, so host and device agree bit for bit; `pow` does not guarantee that.
EMOPT_FN double one_minus_power(double beta, double step) {
  double result = 0.0;
  double square = 1.0 - beta;
  // From 2^53 on a double holds no odd integers; no optimizer counts that far.
  for (uint64_t t = static_cast<uint64_t>(step < 9007199254740992.0 ? step : 9007199254740992.0);
       t != 0; t >>= 1) {
    if ((t & 1) != 0) result += (1.0 - result) * square;
    square += (1.0 - square) * square;
  }
  return result;
}

// The divisor of bias correction, for an average that started at 0; 1 without correction.
EMOPT_FN double bias_correction(double beta, double step, bool correct_bias) {
  return correct_bias ? one_minus_power(beta, step) : 1.0;
}

// sqrt(c2). Rules multiply numerator and eps by it, in
//
//   m_hat / (sqrt(v / c2) + eps)  =  sqrt(c2) m_hat / (sqrt(v) + sqrt(c2) eps),
//
// which changes only constants and avoids the overflow of v / c2.
EMOPT_FN double root_of_correction(double beta, double step, bool correct_bias) {
  return ::sqrt(bias_correction(beta, step, correct_bias));
}

// Linear from 0 to `end` in `warmup_steps` steps, then `end`.
EMOPT_FN double linear_warmup(double step, double end, int64_t warmup_steps) {
  const double n = static_cast<double>(warmup_steps);
  return step < n ? step / n * end : end;
}

// The half-life in steps, minus 1, of an average with this beta; and the inverse function.
EMOPT_FN double half_life(double beta) { return ::log(0.5) / ::log(beta + 1e-8) - 1.0; }
EMOPT_FN double beta_of_half_life(double steps) { return ::pow(0.5, 1.0 / (steps + 1.0)); }

// From `start` to `end`, linear in the half-life; then `end`.
EMOPT_FN double half_life_warmup(double step, double start, double end, int64_t warmup_steps) {
  const double n = static_cast<double>(warmup_steps);
  if (!(step < n)) return end;
  const double done = step / n;
  return beta_of_half_life((1.0 - done) * half_life(start) + done * half_life(end));
}

}  // namespace emopt
