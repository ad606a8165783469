// The functions of traced rules.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "rules/traced.h"

namespace {

template <class Real>
bool same_bits(Real a, Real b) {
  return std::memcmp(&a, &b, sizeof(Real)) == 0;
}

template <class Real>
void test_elements() {
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  const Real inf = std::numeric_limits<Real>::infinity();
  CHECK(emopt::maximum(Real(1), Real(2)) == Real(2));
  CHECK(emopt::maximum(Real(2), Real(1)) == Real(2));
  CHECK(emopt::maximum(-inf, Real(-3)) == Real(-3));
  CHECK(emopt::at_least(Real(1), Real(2)) == Real(2) &&
        emopt::at_most(Real(1), Real(2)) == Real(1));
  CHECK(emopt::at_least(-inf, Real(-3)) == Real(-3) && emopt::at_most(inf, Real(3)) == Real(3));
  CHECK(std::isnan(emopt::at_least(nan, inf)) && std::isnan(emopt::at_most(nan, -inf)));
  CHECK(emopt::at_least(Real(1), nan) == Real(1) && emopt::at_most(Real(1), nan) == Real(1));
  CHECK(emopt::minimum(Real(1), Real(2)) == Real(1));
  CHECK(emopt::minimum(Real(2), Real(1)) == Real(1));
  CHECK(emopt::minimum(inf, Real(-3)) == Real(-3));
  for (const Real other : {Real(1), Real(-1), Real(0), inf, -inf, nan}) {
    CHECK(std::isnan(emopt::maximum(nan, other)) && std::isnan(emopt::maximum(other, nan)));
    CHECK(std::isnan(emopt::minimum(nan, other)) && std::isnan(emopt::minimum(other, nan)));
  }
  // Of zeros of both signs, the second.
  CHECK(same_bits(emopt::maximum(Real(0), Real(-0.0)), Real(-0.0)));
  CHECK(same_bits(emopt::maximum(Real(-0.0), Real(0)), Real(0)));
  CHECK(same_bits(emopt::minimum(Real(0), Real(-0.0)), Real(-0.0)));
  CHECK(same_bits(emopt::minimum(Real(-0.0), Real(0)), Real(0)));

  CHECK(same_bits(emopt::absolute(Real(-0.0)), Real(0)));
  CHECK(emopt::absolute(-inf) == inf && emopt::absolute(Real(-2)) == Real(2));
  CHECK(!std::signbit(emopt::absolute(std::copysign(nan, Real(-1)))));
  CHECK(emopt::copy_sign(Real(2), Real(-0.0)) == Real(-2));
  CHECK(emopt::copy_sign(Real(-2), nan) == Real(2));
  CHECK(same_bits(emopt::copy_sign(Real(0), -inf), Real(-0.0)));

  CHECK(emopt::reciprocal_root(Real(4)) == Real(0.5));
  CHECK(emopt::reciprocal_root(Real(3)) == Real(1) / std::sqrt(Real(3)));
  CHECK(emopt::reciprocal_root(Real(0)) == inf);
  CHECK(std::isnan(emopt::reciprocal_root(Real(-1))));
  CHECK(emopt::as_number<Real>(true) == Real(1) && emopt::as_number<Real>(false) == Real(0));
}

// The quotient and the remainder, as Python prints a // b and a % b.
void check_division(double a, double b, double quotient, double remainder) {
  const auto is = [](double got, double wanted) {
    return std::isnan(wanted) ? std::isnan(got) : same_bits(got, wanted);
  };
  CHECK(is(emopt::floor_divide(a, b), quotient));
  CHECK(is(emopt::floor_modulo(a, b), remainder));
}

void test_division() {
  const double nan = std::nan(""), inf = HUGE_VAL;
  check_division(7.5, 2.0, 3.0, 1.5);
  check_division(-7.5, 2.0, -4.0, 0.5);
  check_division(7.5, -2.0, -4.0, -0.5);
  check_division(-7.5, -2.0, 3.0, -1.5);
  check_division(6.0, 3.0, 2.0, 0.0);
  check_division(6.0, -3.0, -2.0, -0.0);
  check_division(0.0, -3.0, -0.0, -0.0);
  check_division(-0.0, 3.0, -0.0, 0.0);
  check_division(1.0, 0.1, 9.0, 0.09999999999999995);
  check_division(-1e-300, 3.0, -1.0, 3.0);
  check_division(1e300, -0.1, -1e301, -0.09988784035036508);
  check_division(1.0, inf, 0.0, 1.0);
  check_division(-1.0, inf, -1.0, inf);
  check_division(inf, 2.0, nan, nan);
  check_division(nan, 2.0, nan, nan);
  check_division(2.0, nan, nan, nan);
  check_division(2.0, 0.0, nan, nan);  // where Python raises ZeroDivisionError
}

}  // namespace

int main() {
  test_elements<float>();
  test_elements<double>();
  test_division();
}
