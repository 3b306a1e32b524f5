// One table of function pointers per instruction set; one ordered list; the first supported one wins.
//
// Every entry gives the same bits on every instruction set: integer sums are exact, and float work follows the
// order that docs/numerics.md lays down (sums in 16 lanes combined pairwise, no fused multiply-add). The
// scalar table is the obvious twin of all others. Kernels are noexcept, allocate nothing and touch no globals.
#pragma once

#include "onebit/types.h"

namespace onebit {

struct Kernels {
  const char* name;
  // Digits of T80 are slow to take here: a model in T80 is turned into R64 when it is made.
  bool prefers_r64 = false;

  // Exact sums of one tile, for m rows of activations:
  //   out[i * tile_rows + row] = sum over k of w[row, k] * x[i * ldx + k]
  // tile: the tile's units for the first of these k. x: int8, zero beyond the matrix's inputs.
  // sums[i]: the sum of the same k values of x row i. k: a multiple of 16, at most kMaxDotInputs.
  // w is {-1, 0, 1} (T80, R64), {-1, 1} (B128), [-127, 127] (Q8) or [-7, 7] (Q4); x lies in [-127, 127].
  using DotTile = void (*)(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums,
                           int m, int k, std::int32_t* out) noexcept;
  DotTile dot_tile[kEncodings];

  // Sums of a tile, m rows of them: value = float(acc[i * ld_acc + j]) * w_scale[j * stride], for j < n.
  //   y[i * ldy + j] = value * x_scale[i], or with accumulate (groups in ascending order) (y[i * ldy + j] + value) * x_scale[i]
  // x_scale: null before the last group, which does not multiply then. stride: 0 or 1, or the number of groups of a row.
  void (*scale_sums)(const std::int32_t* acc, std::ptrdiff_t ld_acc, const float* w_scale, std::ptrdiff_t stride,
                     const float* x_scale, int m, int n, bool accumulate, float* y, std::ptrdiff_t ldy) noexcept;
  // y[j] = (float(hi[j] * 128 + lo[j]) * w_scale[j]) * x_scale, the sum rounded once to float32.
  void (*scale_sums15)(const std::int32_t* hi, const std::int32_t* lo, const float* w_scale, float x_scale, int n,
                       float* y) noexcept;

  // Activation quantisers of quant.py: codes[0, n), zeros up to n_padded, and the multiplier *scale.
  using Quantize = void (*)(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept;
  Quantize quantize_a8;
  Quantize quantize_a4;
  Quantize quantize_a1;
  // codes = hi * 128 + lo, with lo in [-64, 63].
  void (*quantize_a15)(const float* x, int n, int n_padded, std::int8_t* hi, std::int8_t* lo, float* scale) noexcept;
  // The exact sum of n codes; n is a multiple of 16.
  std::int32_t (*sum_codes)(const std::int8_t* codes, int n) noexcept;

  // y[i] = (x[i] * r) * gain[i],  r = 1 / sqrt(lane_sum(x * x) / n + eps)
  void (*rms_norm)(const float* x, const float* gain, float eps, int n, float* y) noexcept;
  // Half-split rotation of n_heads heads in place: (a, b) -> (a * cos - b * sin, b * cos + a * sin),
  // a = x[i], b = x[i + d_head / 2]; cos, sin: [d_head / 2].
  void (*rope)(float* x, const float* cos, const float* sin, int n_heads, int d_head) noexcept;
  // y[i] = (gate[i] / (1 + exp(-gate[i]))) * up[i]
  void (*silu_mul)(const float* gate, const float* up, int n, float* y) noexcept;
  // y[i] = (r * r) * up[i],  r = gate[i] > 0 ? gate[i] : 0
  void (*relu2_mul)(const float* gate, const float* up, int n, float* y) noexcept;
  // x[i] += y[i]
  void (*add)(const float* y, int n, float* x) noexcept;
  // Round to bfloat16, ties to even.
  void (*to_bf16)(const float* x, int n, std::uint16_t* y) noexcept;
  // y[i] = lane_sum(w[i * ldw + j] * x[j], j < k) for n rows of bfloat16.
  void (*dot_bf16)(const std::uint16_t* w, std::ptrdiff_t ldw, const float* x, int n, int k, float* y) noexcept;

  // Attention of `heads` query heads that share one key-value head, for one token.
  //   q: float32 [heads, d]; k_blocks[b], v_blocks[b]: bfloat16 [kBlockTokens, d]; n_keys keys are visible.
  //   score_j = lane_sum(q * k_j) * inv_sqrt_d. Each block of 64 keys is one split: m = max score, p_j = exp(score_j - m),
  //   l = lane_sum(p) over the block (lane = j mod 16), o = sum of p_j * v_j in ascending j. Splits merge in
  //   ascending order: m' = max(m, m_b), l' = l * exp(m - m') + l_b * exp(m_b - m'), o' likewise; out = o / l.
  void (*attend)(const float* q, int heads, int d, float inv_sqrt_d, const std::uint16_t* const* k_blocks,
                 const std::uint16_t* const* v_blocks, int n_keys, float* out) noexcept;
};

// Tables that this build contains and this CPU runs, best first; `scalar` is always the last. Returns their number. A
// table that does not answer its self-test as `scalar` does, bit for bit, is not among them.
int available_kernels(const Kernels** tables, int capacity) noexcept;
// Tables that this CPU should run, and that failed their self-test. Returns their number.
int broken_kernels(const Kernels** tables, int capacity) noexcept;
// The available table of that name, or nullptr.
const Kernels* find_kernels(const char* name) noexcept;
// The self-test: whether each table gives the bits of the reference in one small case of every kernel.
void self_test(const Kernels& reference, const Kernels* const* tables, int n, bool* is_right) noexcept;

}  // namespace onebit
