#include "onebit/rope.h"

#include <cstdint>

namespace onebit {
namespace {

// pi / 2 in parts of 27, 27 and 53 bits: a quadrant number below 2^24 times one of the first two is exact.
constexpr double kHalfPi1 = 0x1.921fb54000000p+0;
constexpr double kHalfPi2 = 0x1.10b4610000000p-30;
constexpr double kHalfPi3 = 0x1.a62633145c06ep-58;
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;

constexpr double inverse_factorial(int n) {
  double product = 1.0;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1.0 / product;
}

// x^n / n! summed for n = last, last - 2, ..., first, alternating in sign and divided by x^first. For |x| <= pi / 4 the
// first neglected term is below 2^-60.
template <int first, int last>
double alternating_series(double x_squared) {
  double sum = inverse_factorial(last);
  for (int n = last - 2; n >= first; n -= 2) sum = inverse_factorial(n) - x_squared * sum;
  return sum;
}

}  // namespace

void sincos(double x, double* sin, double* cos) noexcept {
  const auto quadrant = static_cast<std::int64_t>(x * kTwoOverPi + 0.5);
  const auto q = static_cast<double>(quadrant);
  const double r = ((x - q * kHalfPi1) - q * kHalfPi2) - q * kHalfPi3;
  const double r2 = r * r;
  const double s = r - r * (r2 * alternating_series<3, 19>(r2));
  const double c = 1.0 - r2 * alternating_series<2, 18>(r2);
  *sin = quadrant & 1 ? c : s;
  *cos = quadrant & 1 ? s : c;
  if (quadrant & 2) *sin = -*sin;
  if ((quadrant + 1) & 2) *cos = -*cos;
}

void rope_angles(int position, const float* inv_freq, int n, double scale, float* cos, float* sin) noexcept {
  for (int i = 0; i < n; ++i) {
    double s, c;
    sincos(static_cast<double>(position) * static_cast<double>(inv_freq[i]), &s, &c);
    cos[i] = static_cast<float>(scale * c);
    sin[i] = static_cast<float>(scale * s);
  }
}

}  // namespace onebit
