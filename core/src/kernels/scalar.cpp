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

// The weights of every byte value.
template <Encoding kEncoding>
struct Weights {
  static constexpr int kGroups = tile_rows(kEncoding) / kLanes;
  std::int8_t of[256][kGroups];

  constexpr Weights() : of{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int j = 0; j < kGroups; ++j) of[byte][j] = static_cast<std::int8_t>(code_of(kEncoding, byte, j));
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

void scale_sums(const std::int32_t* acc, const std::int32_t* lo, std::ptrdiff_t ld_acc, const float* w_scale,
                bool per_row, const float* x_scale, int m, int n, bool accumulate, float* y,
                std::ptrdiff_t ldy) noexcept {
  for (std::ptrdiff_t i = 0; i < m; ++i, y += ldy) {
    for (int j = 0; j < n; ++j) {
      const std::ptrdiff_t at = i * ld_acc + j;
      const std::int64_t sum = lo ? std::int64_t{acc[at]} * 128 + lo[at] : acc[at];
      const float value = static_cast<float>(sum) * w_scale[per_row ? j : 0];
      y[j] = accumulate ? y[j] + value : value;
      if (x_scale) y[j] *= x_scale[i];
    }
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

// ---- Numbers of the cache ----

struct Bf16 {
  std::uint16_t bits;
};

Bf16 encode(float x, Bf16) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  // Rounding would carry a NaN of small payload into infinity: keep its top bits and set the quiet bit.
  const std::uint32_t rounded = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>(rounded >> 16)};
}

float decode(Bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

// Sign, 4 bits of exponent with bias 7, 3 of mantissa. The largest is 448; a larger one, or NaN, becomes that.
struct E4M3 {
  std::uint8_t bits;
};

float decode(E4M3 x) {
  const int exponent = x.bits >> 3 & 15;
  const int mantissa = x.bits & 7;
  const float value = exponent > 0 ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                                   : std::ldexp(static_cast<float>(mantissa), -9);
  return x.bits & 0x80 ? -value : value;
}

E4M3 encode(float x, E4M3) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const float magnitude = std::fabs(x);
  std::uint32_t code = 0x7e;
  if (magnitude < 0x1p-6f) {
    code = static_cast<std::uint32_t>(std::rint(magnitude * 0x1p9f));
  } else if (magnitude < 448.0f) {
    // Rounded to 3 bits of mantissa, which may carry into the exponent; then with the smaller bias.
    const std::uint32_t rounded = (bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1);
    code = (rounded >> 20) - (120 << 3);
  }
  return {static_cast<std::uint8_t>(code | (bits >> 24 & 0x80))};
}

template <typename T>
void to_cache(const float* x, int n, void* y) noexcept {
  T* numbers = static_cast<T*>(y);
  for (int i = 0; i < n; ++i) numbers[i] = encode(x[i], T{});
}

void dot_bf16(const std::uint16_t* w, std::ptrdiff_t ldw, int n, const float* x, std::ptrdiff_t ldx, int m, int k,
              float* y, std::ptrdiff_t ldy) noexcept {
  for (int t = 0; t < m; ++t, x += ldx, y += ldy) {
    for (int i = 0; i < n; ++i) y[i] = lane_sum(k, [&](int j) { return decode(Bf16{w[i * ldw + j]}) * x[j]; });
  }
}

// ---- Attention ----

// The factors of two parts whose largest scores are m and m_b, to be merged; m becomes the larger. That one's factor is 1.
void merge_factors(float m_b, float* m, float* keep, float* take) {
  *keep = m_b > *m ? exponential(*m - m_b) : 1.0f;
  *take = m_b > *m ? 1.0f : exponential(m_b - *m);
  if (m_b > *m) *m = m_b;
}

// Turns n scores into weights exp(score - m); returns m, the largest, and the sum of the weights in *l.
float soften(float* scores, int n, float* l) {
  float m = -HUGE_VALF;
  for (int j = 0; j < n; ++j) {
    if (scores[j] > m) m = scores[j];
  }
  for (int j = 0; j < n; ++j) scores[j] = exponential(scores[j] - m);
  *l = lane_sum(n, [&](int j) { return scores[j]; });
  return m;
}

template <typename T>
void attend_one(const float* q, int d, float inv_sqrt_d, const void* const* k_blocks, const void* const* v_blocks,
                int n_keys, float* m, float* l, float* o) {
  for (int start = 0; start < n_keys; start += kBlockTokens) {
    const T* k = static_cast<const T*>(k_blocks[start / kBlockTokens]);
    const T* v = static_cast<const T*>(v_blocks[start / kBlockTokens]);
    const int n = n_keys - start < kBlockTokens ? n_keys - start : kBlockTokens;

    float p[kBlockTokens];
    for (int j = 0; j < n; ++j) p[j] = lane_sum(d, [&](int i) { return q[i] * decode(k[j * d + i]); }) * inv_sqrt_d;
    float block_l;
    const float block_m = soften(p, n, &block_l);

    float keep = 0.0f;
    float take = 1.0f;
    if (start == 0) {
      *m = block_m;
      *l = block_l;
    } else {
      merge_factors(block_m, m, &keep, &take);
      *l = *l * keep + block_l * take;
    }
    for (int i = 0; i < d; ++i) {
      float sum = 0.0f;
      for (int j = 0; j < n; ++j) sum += p[j] * decode(v[j * d + i]);
      o[i] = start == 0 ? sum : o[i] * keep + sum * take;
    }
  }
}

template <typename T>
void attend(const float* q, int heads, int d, float inv_sqrt_d, const void* const* k_blocks,
            const void* const* v_blocks, int n_keys, float* m, float* l, float* o) noexcept {
  for (int head = 0; head < heads; ++head) {
    attend_one<T>(q + head * d, d, inv_sqrt_d, k_blocks, v_blocks, n_keys, m + head, l + head, o + head * d);
  }
}

void merge_splits(int heads, int d, const float* m_b, const float* l_b, const float* o_b, float* m, float* l,
                  float* o) noexcept {
  for (int head = 0; head < heads; ++head) {
    float keep, take;
    merge_factors(m_b[head], m + head, &keep, &take);
    l[head] = l[head] * keep + l_b[head] * take;
    for (int i = head * d; i < (head + 1) * d; ++i) o[i] = o[i] * keep + o_b[i] * take;
  }
}

void weigh_int8(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const float* k_scale,
                const float* v_scale, float q_scale, int n, Int8Weights* weights, float* m, float* l) noexcept {
  float w[kBlockTokens];
  for (int j = 0; j < n; ++j) {
    const std::ptrdiff_t at = j / kLanes * ld + j % kLanes;
    w[j] = (static_cast<float>(hi[at] * 128 + lo[at]) * k_scale[j]) * q_scale;
  }
  float block_l;
  const float block_m = soften(w, n, &block_l);
  merge_factors(block_m, m, &weights->keep, &weights->take);
  *l = *l * weights->keep + block_l * weights->take;

  float largest = 0.0f;
  for (int j = 0; j < n; ++j) {
    w[j] = w[j] * v_scale[j];
    // Once NaN, always NaN.
    if (!(w[j] <= largest)) largest = largest != largest ? largest : w[j];
  }
  const float factor = 16256.0f / largest;
  weights->scale = largest / 16256.0f;
  weights->hi_sum = weights->lo_sum = 0;
  for (int j = 0; j < kBlockTokens; ++j) {
    const int code = j < n ? round_clamped(w[j] * factor, -16256, 16256) : 0;
    weights->hi[j] = static_cast<std::int8_t>((code + 64) >> 7);
    weights->lo[j] = static_cast<std::int8_t>(code - 128 * weights->hi[j]);
    weights->hi_sum += weights->hi[j];
    weights->lo_sum += weights->lo[j];
  }
}

void mix_int8(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const Int8Weights& weights, int d,
              float* o) noexcept {
  for (int i = 0; i < d; ++i) {
    const std::ptrdiff_t at = i / kLanes * ld + i % kLanes;
    const float value = static_cast<float>(hi[at] * 128 + lo[at]) * weights.scale;
    o[i] = o[i] * weights.keep + value * weights.take;
  }
}

}  // namespace

const Kernels kScalar = {
    .name = "scalar",
    .dot_tile = {dot_tile<Encoding::kT80>, dot_tile<Encoding::kR64>, dot_tile<Encoding::kB128>, dot_tile<Encoding::kQ8>,
                 dot_tile<Encoding::kQ4>},
    .scale_sums = scale_sums,
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
    .dot_bf16 = dot_bf16,
    .to_cache = {to_cache<Bf16>, to_cache<E4M3>},
    .attend = {attend<Bf16>, attend<E4M3>},
    .merge_splits = merge_splits,
    .weigh_int8 = weigh_int8,
    .mix_int8 = mix_int8,
};

}  // namespace onebit
