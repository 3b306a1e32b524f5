// Oracle: the C library's sin and cos.
#include <cmath>
#include <initializer_list>

#include "check.h"
#include "onebit/rope.h"

void test_rope() {
  double worst = 0.0;
  for (int position = 0; position < (1 << 24); position = position * 3 / 2 + 1) {
    for (const double frequency : {1.0, 0.7498942017555237, 0.0031622776, 1e-7}) {
      double sin, cos;
      onebit::sincos(position * frequency, &sin, &cos);
      worst = std::fmax(worst, std::fabs(sin - std::sin(position * frequency)));
      worst = std::fmax(worst, std::fabs(cos - std::cos(position * frequency)));
    }
  }
  CHECK(worst < 1e-15);

  const float inv_freq[] = {1.0f, 0.5f};
  float cos[2], sin[2];
  onebit::rope_angles(0, inv_freq, 2, 1.0, cos, sin);
  CHECK(cos[0] == 1.0f && cos[1] == 1.0f && sin[0] == 0.0f && sin[1] == 0.0f);
  onebit::rope_angles(3, inv_freq, 2, 1.0, cos, sin);
  CHECK(cos[1] == static_cast<float>(std::cos(1.5)) && sin[0] == static_cast<float>(std::sin(3.0)));
  onebit::rope_angles(3, inv_freq, 2, 1.25, cos, sin);
  CHECK(cos[1] == static_cast<float>(1.25 * std::cos(1.5)) && sin[0] == static_cast<float>(1.25 * std::sin(3.0)));
}
