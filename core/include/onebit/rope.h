// Rotary position angles in float64, with the same bits on every platform.
#pragma once

namespace onebit {

// sin and cos of 0 <= x < 2^24 within 2e-16, from basic arithmetic alone: no libm, no fused multiply-add.
void sincos(double x, double* sin, double* cos) noexcept;

// For i < n: cos[i] = float32(scale * cos(float64(position) * float64(inv_freq[i]))), and sin[i] likewise.
void rope_angles(int position, const float* inv_freq, int n, double scale, float* cos, float* sin) noexcept;

}  // namespace onebit
