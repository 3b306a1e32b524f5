// Rotary position angles in float64, with the same bits on every platform.
#pragma once

namespace onebit {

// sin and cos of 0 <= x < 2^24 within 2e-16, from basic arithmetic alone: no libm, no fused multiply-add.
void sincos(double x, double* sin, double* cos) noexcept;

// cos[i], sin[i] = float32 of cos and sin of float64(position) * float64(inv_freq[i]), for i < n.
void rope_angles(int position, const float* inv_freq, int n, float* cos, float* sin) noexcept;

}  // namespace onebit
