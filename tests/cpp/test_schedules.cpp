// Bias corrections and warm-up schedules.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "rules/schedules.h"

namespace {

bool is_close(double a, double b, double relative) {
  return std::abs(a - b) <= relative * std::abs(b);
}

void test_one_minus_power() {
  CHECK(emopt::one_minus_power(0.9, 0) == 0.0);
  CHECK(emopt::one_minus_power(0.0, 1) == 1.0);
  CHECK(emopt::one_minus_power(0.0, 1000) == 1.0);
  for (const double beta : {1e-300, 0.1, 0.5, 0.9, 0.999, 0.9999, 0.99999999, 1.0 - 0x1p-53}) {
    CHECK(emopt::one_minus_power(beta, 1) == 1.0 - beta);
    for (const double step : {2.0, 3.0, 7.0, 100.0, 1e3, 65537.0, 1e6, 1e9, 9e15}) {
      const double expected = -std::expm1(step * std::log1p(beta - 1.0));
      // The tolerance covers 64 roundings and the error of the reference.
      CHECK(is_close(emopt::one_minus_power(beta, step), expected, 0x1p-46));
    }
  }
  CHECK(emopt::one_minus_power(0.5, 1e300) == 1.0);
}

void test_warmups() {
  using emopt::half_life_warmup;
  using emopt::linear_warmup;
  CHECK(linear_warmup(1, 5.0, 0) == 5.0);
  CHECK(linear_warmup(0, 5.0, 10) == 0.0);
  CHECK(linear_warmup(5, 5.0, 10) == 2.5);
  CHECK(linear_warmup(10, 5.0, 10) == 5.0);
  CHECK(half_life_warmup(1, 0.9, 0.9999, 0) == 0.9999);
  CHECK(half_life_warmup(10, 0.9, 0.9999, 10) == 0.9999);
  CHECK(is_close(half_life_warmup(0, 0.9, 0.9999, 10), 0.9, 1e-6));
  double last = 0.0;
  for (int step = 0; step <= 100; ++step) {
    const double beta = half_life_warmup(step, 0.9, 0.9999, 100);
    CHECK(beta > last && beta <= 0.9999);
    last = beta;
  }
  // Linear in the half-life, not in beta.
  const double middle = half_life_warmup(50, 0.9, 0.9999, 100);
  const auto half_life = [](double beta) { return std::log(0.5) / std::log(beta); };
  CHECK(is_close(half_life(middle), (half_life(0.9) + half_life(0.9999)) / 2, 1e-3));
}

}  // namespace

int main() {
  test_one_minus_power();
  test_warmups();
}
