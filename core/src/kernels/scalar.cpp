// The slow obvious twin of every kernel: plain loops that say what the numbers are. It runs on any CPU, and every
// other table must give its bits.
//
// The packed byte at unit u, lane r, input i stands at tile[64 * u + 4 * r + i], and holds one weight of each row
// 16 * j + r at k = 4 * u + i:
//
//   layout   a byte holds                                       bits per weight    multiplies per byte
//   T80      ceil(256 / 243 * (t_0 .. t_4 in base 3)), t = w+1  1.6                5
//   R64      t_0 | t_1 << 2 | t_2 << 4 | t_3 << 6, t = w + 1    2                  4
//   B128     b_0 | b_1 << 1 | ... | b_7 << 7, b = (w + 1) / 2   1                  8
//   Q8       w_0 + 128                                          8                  1
//   Q4       (w_0 + 8) | (w_1 + 8) << 4                         4                  2
//
// Bytes that packing never writes are decoded by the same arithmetic, so even they mean the same everywhere.
#include <bit>
#include <cmath>

#include "tables.h"

// Rounding is part of the definition: this file is meaningless with fused multiply-add or reassociation.
#if defined(__FAST_MATH__)
#error "compile the kernels without -ffast-math"
#endif

namespace onebit {
namespace {

constexpr int kLanes = 16;

// ---- Exact sums ----

// The weight of row group j in a packed byte.
constexpr int decode(Encoding encoding, int byte, int j) {
  switch (encoding) {
    case Encoding::kT80:
      // 256 / 243 of a base-3 number: each multiplication by 3 carries the next digit out of the byte.
      for (int i = 0; i < j; ++i) byte = byte * 3 % 256;
      return byte * 3 / 256 - 1;
    case Encoding::kR64:
      return (byte >> 2 * j & 3) - 1;
    case Encoding::kB128:
      return 2 * (byte >> j & 1) - 1;
    case Encoding::kQ8:
      return byte - 128;
    case Encoding::kQ4:
      return (byte >> 4 * j & 15) - 8;
  }
  return 0;
}

// The weights of every byte value.
template <Encoding kEncoding>
struct Weights {
  static constexpr int kGroups = tile_rows(kEncoding) / kLanes;
  std::int8_t of[256][kGroups];

  constexpr Weights() : of{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int j = 0; j < kGroups; ++j) of[byte][j] = static_cast<std::int8_t>(decode(kEncoding, byte, j));
    }
  }
};

template <Encoding kEncoding>
void dot_tile(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t*, int m, int k,
              std::int32_t* out) noexcept {
  static constexpr Weights<kEncoding> kWeights;
  constexpr int kRows = tile_rows(kEncoding);
  for (int i = 0; i < m * kRows; ++i) out[i] = 0;
  for (int kk = 0; kk < k; ++kk) {
    std::int8_t weights[kRows];
    for (int row = 0; row < kRows; ++row) {
      const int byte = tile[64 * (kk / 4) + 4 * (row % kLanes) + kk % 4];
      weights[row] = kWeights.of[byte][row / kLanes];
    }
    for (int i = 0; i < m; ++i) {
      const int value = x[i * ldx + kk];
      for (int row = 0; row < kRows; ++row) out[i * kRows + row] += weights[row] * value;
    }
  }
}

void scale_sums(const std::int32_t* acc, std::ptrdiff_t ld_acc, const float* w_scale, std::ptrdiff_t stride,
                const float* x_scale, int m, int n, bool accumulate, float* y, std::ptrdiff_t ldy) noexcept {
  for (int i = 0; i < m; ++i, acc += ld_acc, y += ldy) {
    for (int j = 0; j < n; ++j) {
      const float value = static_cast<float>(acc[j]) * w_scale[j * stride];
      y[j] = accumulate ? y[j] + value : value;
      if (x_scale) y[j] *= x_scale[i];
    }
  }
}

void scale_sums15(const std::int32_t* hi, const std::int32_t* lo, const float* w_scale, float x_scale, int n,
                  float* y) noexcept {
  for (int j = 0; j < n; ++j) {
    const std::int64_t sum = std::int64_t{hi[j]} * 128 + lo[j];
    y[j] = static_cast<float>(sum) * w_scale[j] * x_scale;
  }
}

// ---- Float work, in its fixed order ----

// Sum of term(0) .. term(n - 1): term i goes to lane i mod 16, then the lanes are combined pairwise.
template <typename Term>
float lane_sum(int n, Term term) {
  float lane[kLanes] = {};
  for (int i = 0; i < n; ++i) lane[i % kLanes] += term(i);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

// exp(x) as 2^n * exp(r), n = round(x / ln 2), within 1e-7. Saturates: 0 below -87, infinity above 88.
float exponential(float x) {
  if (x < -87.0f) return 0.0f;
  if (x > 88.0f) return HUGE_VALF;
  if (x != x) return x;
  const float n = std::rint(x * 0x1.715476p+0f);
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6a23dcp-10f;
  p = p * r + 0x1.123a26p-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  return (1.0f + (r + (r * r) * p)) * std::ldexp(1.0f, static_cast<int>(n));
}

constexpr float kEpsilon = 1e-5f;

// The largest magnitude, at least epsilon; NaN if any value is NaN.
float largest_magnitude(const float* x, int n) {
  float largest = kEpsilon;
  for (int i = 0; i < n; ++i) {
    if (x[i] != x[i]) return x[i];
    if (std::fabs(x[i]) > largest) largest = std::fabs(x[i]);
  }
  return largest;
}

// The mean magnitude, at least epsilon; NaN if any value is NaN.
float mean_magnitude(const float* x, int n) {
  const float mean = lane_sum(n, [&](int i) { return std::fabs(x[i]); }) / static_cast<float>(n);
  return mean < kEpsilon ? kEpsilon : mean;
}

// x to the nearest whole number in [low, high], ties to even; NaN becomes 0.
int round_clamped(float x, int low, int high) {
  if (x != x) return 0;
  if (x < static_cast<float>(low)) return low;
  if (x > static_cast<float>(high)) return high;
  return static_cast<int>(std::rint(x));
}

void quantize_a8(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  const float largest = largest_magnitude(x, n);
  const float factor = 127.0f / largest;
  *scale = largest / 127.0f;
  for (int i = 0; i < n_padded; ++i) {
    codes[i] = static_cast<std::int8_t>(i < n ? round_clamped(x[i] * factor, -127, 127) : 0);
  }
}

void quantize_a4(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  const float sqrt7 = std::sqrt(7.0f);
  const float mean = mean_magnitude(x, n);
  const float factor = sqrt7 / mean;
  *scale = mean / sqrt7;
  for (int i = 0; i < n_padded; ++i) {
    codes[i] = static_cast<std::int8_t>(i < n ? round_clamped(x[i] * factor, -8, 7) : 0);
  }
}

void quantize_a1(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  *scale = mean_magnitude(x, n);
  for (int i = 0; i < n_padded; ++i) codes[i] = static_cast<std::int8_t>(i < n ? (x[i] > 0.0f ? 1 : -1) : 0);
}

void quantize_a15(const float* x, int n, int n_padded, std::int8_t* hi, std::int8_t* lo, float* scale) noexcept {
  const float largest = largest_magnitude(x, n);
  const float factor = 16256.0f / largest;
  *scale = largest / 16256.0f;
  for (int i = 0; i < n_padded; ++i) {
    const int code = i < n ? round_clamped(x[i] * factor, -16256, 16256) : 0;
    hi[i] = static_cast<std::int8_t>((code + 64) >> 7);
    lo[i] = static_cast<std::int8_t>(code - 128 * hi[i]);
  }
}

std::int32_t sum_codes(const std::int8_t* codes, int n) noexcept {
  std::int32_t sum = 0;
  for (int i = 0; i < n; ++i) sum += codes[i];
  return sum;
}

void rms_norm(const float* x, const float* gain, float eps, int n, float* y) noexcept {
  const float sum = lane_sum(n, [&](int i) { return x[i] * x[i]; });
  const float r = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = (x[i] * r) * gain[i];
}

void rope(float* x, const float* cos, const float* sin, int n_heads, int d_head) noexcept {
  const int half = d_head / 2;
  for (int head = 0; head < n_heads; ++head) {
    for (int i = 0; i < half; ++i) {
      const float a = x[head * d_head + i];
      const float b = x[head * d_head + i + half];
      x[head * d_head + i] = a * cos[i] - b * sin[i];
      x[head * d_head + i + half] = b * cos[i] + a * sin[i];
    }
  }
}

void silu_mul(const float* gate, const float* up, int n, float* y) noexcept {
  for (int i = 0; i < n; ++i) y[i] = (gate[i] / (1.0f + exponential(-gate[i]))) * up[i];
}

void relu2_mul(const float* gate, const float* up, int n, float* y) noexcept {
  for (int i = 0; i < n; ++i) {
    const float r = gate[i] > 0.0f ? gate[i] : 0.0f;
    y[i] = (r * r) * up[i];
  }
}

void add(const float* y, int n, float* x) noexcept {
  for (int i = 0; i < n; ++i) x[i] += y[i];
}

void to_bf16(const float* x, int n, std::uint16_t* y) noexcept {
  for (int i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(x[i]);
    // Rounding would carry a NaN of small payload into infinity: keep its top bits and set the quiet bit.
    const std::uint32_t rounded = x[i] != x[i] ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    y[i] = static_cast<std::uint16_t>(rounded >> 16);
  }
}

float from_bf16(std::uint16_t x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

void dot_bf16(const std::uint16_t* w, std::ptrdiff_t ldw, const float* x, int n, int k, float* y) noexcept {
  for (int i = 0; i < n; ++i) y[i] = lane_sum(k, [&](int j) { return from_bf16(w[i * ldw + j]) * x[j]; });
}

void attend_one(const float* q, int d, float inv_sqrt_d, const std::uint16_t* const* k_blocks,
                const std::uint16_t* const* v_blocks, int n_keys, float* out) {
  float m = 0.0f;
  float l = 0.0f;
  for (int start = 0; start < n_keys; start += kBlockTokens) {
    const std::uint16_t* k = k_blocks[start / kBlockTokens];
    const std::uint16_t* v = v_blocks[start / kBlockTokens];
    const int n = n_keys - start < kBlockTokens ? n_keys - start : kBlockTokens;

    float p[kBlockTokens];
    float block_m = -HUGE_VALF;
    for (int j = 0; j < n; ++j) {
      p[j] = lane_sum(d, [&](int i) { return q[i] * from_bf16(k[j * d + i]); }) * inv_sqrt_d;
      if (p[j] > block_m) block_m = p[j];
    }
    for (int j = 0; j < n; ++j) p[j] = exponential(p[j] - block_m);
    const float block_l = lane_sum(n, [&](int j) { return p[j]; });

    const bool is_first = start == 0;
    const float new_m = is_first || block_m > m ? block_m : m;
    const float keep = is_first ? 0.0f : exponential(m - new_m);
    const float take = is_first ? 1.0f : exponential(block_m - new_m);
    m = new_m;
    l = is_first ? block_l : l * keep + block_l * take;
    for (int i = 0; i < d; ++i) {
      float o = 0.0f;
      for (int j = 0; j < n; ++j) o += p[j] * from_bf16(v[j * d + i]);
      out[i] = is_first ? o : out[i] * keep + o * take;
    }
  }
  for (int i = 0; i < d; ++i) out[i] = out[i] / l;
}

void attend(const float* q, int heads, int d, float inv_sqrt_d, const std::uint16_t* const* k_blocks,
            const std::uint16_t* const* v_blocks, int n_keys, float* out) noexcept {
  for (int head = 0; head < heads; ++head) {
    attend_one(q + head * d, d, inv_sqrt_d, k_blocks, v_blocks, n_keys, out + head * d);
  }
}

}  // namespace

const Kernels kScalar = {
    .name = "scalar",
    .dot_tile = {dot_tile<Encoding::kT80>, dot_tile<Encoding::kR64>, dot_tile<Encoding::kB128>, dot_tile<Encoding::kQ8>,
                 dot_tile<Encoding::kQ4>},
    .scale_sums = scale_sums,
    .scale_sums15 = scale_sums15,
    .quantize_a8 = quantize_a8,
    .quantize_a4 = quantize_a4,
    .quantize_a1 = quantize_a1,
    .quantize_a15 = quantize_a15,
    .sum_codes = sum_codes,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .relu2_mul = relu2_mul,
    .add = add,
    .to_bf16 = to_bf16,
    .dot_bf16 = dot_bf16,
    .attend = attend,
};

}  // namespace onebit
