// A caller's flushing of denormals and its rounding are off in the standard mode, and come back after it. Kind: exact.
#include <cfenv>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"
#include "onebit/float_mode.h"

namespace {

void flush_denormals(bool flush) {
#if defined(__x86_64__)
  constexpr unsigned kFlush = 0x8040;
  _mm_setcsr(flush ? _mm_getcsr() | kFlush : _mm_getcsr() & ~kFlush);
#elif defined(__aarch64__)
  constexpr unsigned long kFlush = 1ul << 24;
  unsigned long mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  mode = flush ? mode | kFlush : mode & ~kFlush;
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
  static_cast<void>(flush);
#endif
}

// Volatile on both sides, so that they are computed when they are asked for: the compiler knows no modes.
float half_of_smallest_normal() {
  volatile float x = 0x1p-126f;
  x = x * 0.5f;
  return x;
}

float one_and_a_bit() {
  volatile float x = 1.0f;
  x = x + 0x1p-30f;
  return x;
}

}  // namespace

void test_float_mode() {
  flush_denormals(true);
  std::fesetround(FE_UPWARD);
  {
    onebit::StandardFloatMode standard;
    CHECK(half_of_smallest_normal() == 0x1p-127f);
    CHECK(one_and_a_bit() == 1.0f);
  }
#if defined(__x86_64__) || defined(__aarch64__)
  const float flushed = half_of_smallest_normal();
#endif
  const float rounded_up = one_and_a_bit();
  std::fesetround(FE_TONEAREST);
  flush_denormals(false);
#if defined(__x86_64__) || defined(__aarch64__)
  CHECK(flushed == 0.0f);
#endif
  CHECK(rounded_up == 1.0f + 0x1p-23f);
}
