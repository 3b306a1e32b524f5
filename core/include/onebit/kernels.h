// One table of function pointers per instruction set; one ordered list; the first supported one wins.
//
// Every entry gives the same bits on every instruction set: integer sums are exact, and float work follows the
// order that docs/numerics.md lays down (sums in 16 lanes combined pairwise, no fused multiply-add). The
// scalar table is the obvious twin of all others. Kernels are noexcept, allocate nothing and touch no globals.
#pragma once

#include "onebit/types.h"

namespace onebit {

// What one query makes of a block of an int8 cache: codes [kBlockTokens] in two planes, the sum of each, their multiplier,
// and the factors of what came before and of this block.
struct Int8Weights {
  std::int8_t* hi;
  std::int8_t* lo;
  std::int32_t hi_sum;
  std::int32_t lo_sum;
  float scale;
  float keep;
  float take;
};

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
  // dot_tile of two tiles of Q8, the second tile_bytes after the first, and its sums [m, 16] next_out values after those
  // of the first: faster than one by one for few rows of activations. Null where it is not.
  void (*dot_pair)(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, const std::int8_t* x, std::ptrdiff_t ldx,
                   const std::int32_t* sums, int m, int k, std::int32_t* out,
                   std::ptrdiff_t next_out) noexcept = nullptr;

  // Sums of a tile, m rows of them: value = float(sum) * w_scale[per_row ? j : 0], for j < n, where sum is acc[i * ld_acc + j],
  // or with lo (two planes) acc[i * ld_acc + j] * 128 + lo[i * ld_acc + j], rounded once to float32.
  //   y[i * ldy + j] = value * x_scale[i], or with accumulate (groups in ascending order) (y[i * ldy + j] + value) * x_scale[i]
  // x_scale: null before the last group, which does not multiply then.
  void (*scale_sums)(const std::int32_t* acc, const std::int32_t* lo, std::ptrdiff_t ld_acc, const float* w_scale,
                     bool per_row, const float* x_scale, int m, int n, bool accumulate, float* y,
                     std::ptrdiff_t ldy) noexcept;

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
  // y[t * ldy + i] = lane_sum(w[i * ldw + j] * x[t * ldx + j], j < k) for n rows of bfloat16 and m tokens.
  void (*dot_bf16)(const std::uint16_t* w, std::ptrdiff_t ldw, int n, const float* x, std::ptrdiff_t ldx, int m, int k,
                   float* y, std::ptrdiff_t ldy) noexcept;

  // Round to the numbers of a cache, ties to even: uint16 bfloat16, or uint8 e4m3, where what is larger than 448, or NaN,
  // becomes 448.
  void (*to_cache[kFloatFormats])(const float* x, int n, void* y) noexcept;
  // One split of the keys for `heads` query heads of one token that share one key-value head.
  //   q: float32 [heads, d]; k_blocks[b], v_blocks[b]: [kBlockTokens, d] numbers of the format; n_keys <= kSplitTokens
  //   keys are visible. One more block is named, which is asked for ahead of time: any that may be touched.
  //   score_j = lane_sum(q * k_j) * inv_sqrt_d. In each block of 64 keys: m = max score, p_j = exp(score_j - m),
  //   l = lane_sum(p) over the block (lane = j mod 16), o = sum of p_j * v_j in ascending j. Blocks merge in
  //   ascending order: m' = max(m, m_b), l' = l * exp(m - m') + l_b * exp(m_b - m'), o' likewise.
  //   m, l: [heads]; o: [heads, d].
  using Attend = void (*)(const float* q, int heads, int d, float inv_sqrt_d, const void* const* k_blocks,
                          const void* const* v_blocks, int n_keys, float* m, float* l, float* o) noexcept;
  Attend attend[kFloatFormats];
  // Merges the split b into those before it, as blocks are merged.
  void (*merge_splits)(int heads, int d, const float* m_b, const float* l_b, const float* o_b, float* m, float* l,
                       float* o) noexcept;

  // One query and one block of an int8 cache: from scores to weights of its values.
  //   hi, lo: exact products of the planes of the query and key j, at [ld * (j / 16) + j % 16]; n keys are visible.
  //   score_j = (float(hi * 128 + lo) * k_scale[j]) * q_scale, m_b = max score, p_j = exp(score_j - m_b), l_b = lane_sum(p)
  //   w_j = p_j * v_scale[j], codes = round(w * (16256 / max w)) = hi * 128 + lo as in quantize_a15, zeros from n on;
  //   w_scale = max w / 16256
  //   m' = max(m, m_b), keep = exp(m - m'), take = exp(m_b - m'), the larger one's being 1; l' = l * keep + l_b * take
  void (*weigh_int8)(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const float* k_scale,
                     const float* v_scale, float q_scale, int n, Int8Weights* weights, float* m, float* l) noexcept;
  // o[i] = o[i] * keep + (float(hi * 128 + lo) * w_scale) * take, products at [ld * (i / 16) + i % 16], for i < d.
  void (*mix_int8)(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const Int8Weights& weights, int d,
                   float* o) noexcept;
};

// Tables that this build contains and this CPU runs, best first; `scalar` is always the last. Returns their number. A
// table that does not answer its self-test as `scalar` does, bit for bit, is not among them.
int available_kernels(const Kernels** tables, int capacity) noexcept;
// Tables that this CPU should run, and that failed their self-test. Returns their number.
int broken_kernels(const Kernels** tables, int capacity) noexcept;
// The available table of that name, or nullptr.
const Kernels* find_kernels(const char* name) noexcept;
// The self-test: one small case of every kernel. Tells the kernels of a table whose bits are others than those of the
// reference, in the order in which they run: what the first one spoils, later ones may repeat. Returns their number.
int self_test(const Kernels& reference, const Kernels& table, const char** names, int capacity) noexcept;

}  // namespace onebit
