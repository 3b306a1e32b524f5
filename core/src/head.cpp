#include "onebit/head.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace onebit {
namespace {

// Tokens that are looked at together: a tile of Q8.
constexpr int kBlock = tile_rows(Encoding::kQ8);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// An int4 shortlist trusts rounding errors to add up like noise, up to so many standard deviations.
constexpr double kSigmas = 8.0;
// No sum of products this small overflows, and so large are no logits of a sound model.
constexpr double kMaxProduct = 0x1p120;
// More than this share of the vocabulary is no short list.
constexpr int kMaxShare = 8;

int n_blocks(int n) { return (n + kBlock - 1) / kBlock; }

// The upper half of a code's byte as Q4 stores it: round(code / 16) + 8, within what Q4 holds.
int upper_half(int byte) { return std::clamp((byte + 8) >> 4, 1, 15); }

}  // namespace

Head::Head(const HeadWeights& weights, const Kernels& kernels, ThreadPool& pool)
    : weights_(weights), kernels_(kernels), shortlist_{}, bounds_(weights.bounds) {
  if (weights_.int4_shortlist) {
    halve(pool);
  } else if (weights_.bf16) {
    shortlist_ = weights_.rows;
  } else if (kernels.prefers_r64 && weights_.rows.encoding == Encoding::kT80) {
    weights_.rows = to_r64(pool, weights_.rows, r64_);
  }
  const int n = weights_.rows.n;
  if (shortlist_.data) largest_norm_ = *std::max_element(bounds_ + n, bounds_ + 2 * static_cast<std::ptrdiff_t>(n));
}

// ---- An int4 shortlist from the Q8 rows ----

void Head::halve(ThreadPool& pool) {
  const std::size_t n = weights_.rows.n;
  constexpr int kRows = tile_rows(Encoding::kQ4);
  const int n_tiles = (weights_.rows.n + kRows - 1) / kRows;
  q4_.reserve(static_cast<std::size_t>(n_tiles) * kBlock * pad_inputs(weights_.rows.k));
  q4_scale_.reserve(n);
  q4_bounds_.reserve(2 * n);
  pool.begin();
  pool.run(n_tiles, [&](int, int begin, int end) {
    for (int tile = begin; tile < end; ++tile) halve_tile(tile);
  });
  shortlist_ = weights_.rows;
  shortlist_.encoding = Encoding::kQ4;
  shortlist_.data = q4_.get();
  shortlist_.scale = q4_scale_.get();
  bounds_ = q4_bounds_.get();
}

// Both layouts hold an input of a lane at the same byte, and a tile of Q4 holds the rows of two tiles of Q8.
void Head::halve_tile(int tile) {
  constexpr int kUnit = 64;
  const std::size_t n = weights_.rows.n;
  const std::size_t tile_bytes = static_cast<std::size_t>(kBlock) * pad_inputs(weights_.rows.k);
  std::uint8_t* out = q4_.get() + tile * tile_bytes;
  for (int half = 0; half < 2; ++half) {
    const std::size_t block = 2 * static_cast<std::size_t>(tile) + half;
    if (block * kBlock >= n) {
      for (std::size_t i = 0; i < tile_bytes; ++i) out[i] |= 8 << 4;
      return;
    }
    const std::uint8_t* q8 = weights_.rows.data + block * tile_bytes;
    std::int32_t squares[kUnit] = {};
    for (std::size_t unit = 0; unit < tile_bytes; unit += kUnit) {
      for (int i = 0; i < kUnit; ++i) {
        const int byte = q8[unit + i];
        const int upper = upper_half(byte);
        squares[i] += (byte - 16 * upper) * (byte - 16 * upper);
        out[unit + i] = static_cast<std::uint8_t>(half ? out[unit + i] | upper << 4 : upper);
      }
    }
    for (std::size_t row = block * kBlock; row < std::min(n, (block + 1) * kBlock); ++row) {
      const std::int32_t* of_row = squares + 4 * (row % kBlock);
      const double square = static_cast<double>(of_row[0]) + of_row[1] + of_row[2] + of_row[3];
      const float scale = weights_.rows.scale[row];
      const float error = scale * static_cast<float>(std::sqrt(square));
      q4_scale_.get()[row] = 16.0f * scale;
      q4_bounds_.get()[row] = weights_.bounds ? weights_.bounds[row] + error : error;
      const float most = 127.0f * scale * std::sqrt(static_cast<float>(weights_.rows.k));
      q4_bounds_.get()[n + row] = weights_.bounds ? weights_.bounds[n + row] : most;
    }
  }
}

// ---- Logits ----

void Head::forward(ThreadPool& pool, int n_rows, const std::int32_t* top_k, float* logits) {
  if (n_rows == 0) return;
  const int n = weights_.rows.n;
  const int d = weights_.rows.k;
  const int k = top_k ? *std::max_element(top_k, top_k + n_rows) : 0;
  const bool needs_all =
      !shortlist_.data || !top_k || *std::min_element(top_k, top_k + n_rows) == 0 || k > n / kMaxShare;
  if (needs_all && weights_.bf16) {
    pool.run_dynamic(n_blocks(n), [&](int, int begin, int end) {
      for (std::size_t v = static_cast<std::size_t>(begin) * kBlock; begin < end; ++begin, v += kBlock) {
        const int count = std::min(kBlock, n - static_cast<int>(v));
        kernels_.dot_bf16(weights_.bf16 + v * pad_inputs(d), pad_inputs(d), count, h_RD_.get(), d, n_rows, d,
                          logits + v, n);
      }
    });
    return;
  }
  quantize(pool, n_rows);
  const LinearOutput output[] = {{needs_all ? &weights_.rows : &shortlist_, logits}};
  linear(kernels_, pool, output, codes_);
  if (needs_all) return;

  // These were approximations. Exact values of the best k, and of whatever may be better than the k-th of these.
  const int n_shares = pool.size();
  best_.reserve(static_cast<std::size_t>(n_shares) * n_rows * k);
  std::fill_n(n_best_.reserve(static_cast<std::size_t>(n_shares) * n_rows), n_shares * n_rows, 0);
  pool.run(n, [&](int share, int begin, int end) { find_best(share, begin, end, n_rows, k, logits); });
  for (int r = 0; r < n_rows; ++r) merge_best(n_shares, n_rows, r, k);
  pool.run(n_rows * k, [&](int, int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (i % k >= n_best_.get()[i / k]) continue;
      Scored& best = best_.get()[i];
      bool is_wanted[kBlock] = {};
      float scores[kBlock];
      is_wanted[best.id % kBlock] = true;
      score_block(best.id / kBlock, i / k, is_wanted, scores);
      best.score = scores[best.id % kBlock];
    }
  });
  for (int r = 0; r < n_rows; ++r) {
    const Scored* best = best_.get() + static_cast<std::size_t>(r) * k;
    bounds_R_.get()[r].threshold = threshold(best, n_best_.get()[r], top_k[r]);
  }
  pool.run(n_blocks(n), [&](int, int begin, int end) {
    for (int block = begin; block < end; ++block) keep_candidates(block, n_rows, logits);
  });
}

void Head::quantize(ThreadPool& pool, int n_rows) {
  codes_.resize(weights_.rows, n_rows, Activations::kA15);
  bounds_R_.reserve(n_rows);
  pool.run(n_rows, [&](int, int begin, int end) {
    for (int r = begin; r < end; ++r) {
      codes_.write(kernels_, h_RD_.get() + static_cast<std::size_t>(r) * weights_.rows.k, r);
      if (shortlist_.data) bounds_R_.get()[r] = bound(r);
    }
  });
}

// The proof is in docs/numerics.md; names as there.
Head::Bound Head::bound(int row) const {
  const int d = weights_.rows.k;
  const float* x = h_RD_.get() + static_cast<std::size_t>(row) * d;
  const std::int8_t* hi = codes_.row_codes(0, row);
  const std::int8_t* lo = codes_.row_codes(1, row);
  const double scale = codes_.scale.get()[row];
  double squares = 0.0, error_squares = 0.0;
  for (int i = 0; i < d; ++i) {
    const double error = x[i] - (hi[i] * 128 + lo[i]) * scale;
    squares += static_cast<double>(x[i]) * x[i];
    error_squares += error * error;
  }
  const double norm = std::sqrt(squares);
  const double delta = std::sqrt(error_squares);
  // Where sums may overflow, also through infinity and NaN, no bound holds: a NaN keeps all tokens.
  if (!((norm + delta) * largest_norm_ < kMaxProduct)) return {.errors = NAN, .norms = 0, .rest = 0, .threshold = 0};

  constexpr double kUnit = 0x1p-24;
  const double gamma = (pad_inputs(d) / 16 + 6) * kUnit * 1.01;
  const double approximation = 4 * kUnit * (norm + delta);
  double errors = norm + delta + approximation;
  if (weights_.int4_shortlist) errors *= kSigmas / std::sqrt(static_cast<double>(d));
  // Upwards by more than all float32 roundings from here on.
  constexpr double kUp = 1 + 0x1p-20;
  return {.errors = static_cast<float>(errors * kUp),
          // The Q8 rows are as exact as they are defined, 15 bits of activations included.
          .norms = weights_.bf16 ? static_cast<float>((delta + gamma * norm + approximation) * kUp) : 0.0f,
          .rest = static_cast<float>(d) * 0x1p-148f,
          .threshold = 0.0f};
}

// ---- The best approximations ----

// Equal ones by ascending id, so that the choice does not depend on who looks where.
bool Head::ranks_before(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// The k best of tokens [begin, end), as a heap with the worst of them on top.
void Head::find_best(int share, int begin, int end, int n_rows, int k, const float* logits) {
  constexpr int kRun = 64;
  for (std::size_t r = 0; r < static_cast<std::size_t>(n_rows); ++r) {
    const float* scores = logits + r * weights_.rows.n;
    Scored* best = best_.get() + (static_cast<std::size_t>(share) * n_rows + r) * k;
    int n_best = 0;
    // NaN is never above, and so never among the best.
    float worst = -kInfinity;
    for (int run = begin; run < end; run += kRun) {
      const int run_end = std::min(end, run + kRun);
      int n_above = 0;
      for (int v = run; v < run_end; ++v) n_above += scores[v] > worst;
      if (n_above == 0) continue;
      for (int v = run; v < run_end; ++v) {
        if (!(scores[v] > worst)) continue;
        if (n_best == k) {
          std::pop_heap(best, best + k, ranks_before);
          best[k - 1] = {scores[v], v};
        } else {
          best[n_best++] = {scores[v], v};
        }
        std::push_heap(best, best + n_best, ranks_before);
        if (n_best == k) worst = best[0].score;
      }
    }
    n_best_.get()[static_cast<std::size_t>(share) * n_rows + r] = n_best;
  }
}

// The k best of all shares, sorted, in the place of the first share.
void Head::merge_best(int n_shares, int n_rows, int row, int k) {
  Scored* best = best_.get() + static_cast<std::size_t>(row) * k;
  int n_best = n_best_.get()[row];
  std::sort_heap(best, best + n_best, ranks_before);
  for (int share = 1; share < n_shares; ++share) {
    const std::size_t at = static_cast<std::size_t>(share) * n_rows + row;
    const Scored* more = best_.get() + at * k;
    for (int i = 0; i < n_best_.get()[at]; ++i) {
      if (n_best == k && !ranks_before(more[i], best[k - 1])) continue;
      n_best = std::min(n_best + 1, k);
      Scored* at_rank = std::upper_bound(best, best + n_best - 1, more[i], ranks_before);
      std::move_backward(at_rank, best + n_best - 1, best + n_best);
      *at_rank = more[i];
    }
  }
  n_best_.get()[row] = n_best;
}

// The worst logit of the k best approximations: at least k logits are as good. -infinity, which keeps all tokens, where
// they are too few or no numbers.
float Head::threshold(const Scored* best, std::int64_t n_best, int k) const {
  if (n_best < k) return -kInfinity;
  float worst = kInfinity;
  for (int i = 0; i < k; ++i) {
    if (best[i].score != best[i].score) return -kInfinity;
    worst = std::min(worst, best[i].score);
  }
  return worst;
}

// ---- Exact logits of the candidates ----

void Head::keep_candidates(int block, int n_rows, float* logits) const {
  const std::size_t n = weights_.rows.n;
  const std::size_t first = static_cast<std::size_t>(block) * kBlock;
  const int count = static_cast<int>(std::min<std::size_t>(kBlock, n - first));
  const float* errors = bounds_ + first;
  const float* norms = bounds_ + n + first;
  for (int r = 0; r < n_rows; ++r) {
    const Bound& bound = bounds_R_.get()[r];
    float* y = logits + r * n + first;
    // The most that a logit can be; NaN is not below.
    const auto may_be_best = [&](int j) {
      return !(y[j] + (bound.errors * errors[j] + bound.norms * norms[j] + bound.rest) < bound.threshold);
    };
    int n_wanted = 0;
    for (int j = 0; j < count; ++j) n_wanted += may_be_best(j);
    if (n_wanted == 0) {
      std::fill_n(y, count, -kInfinity);
      continue;
    }
    bool is_wanted[kBlock] = {};
    for (int j = 0; j < count; ++j) is_wanted[j] = may_be_best(j);
    float scores[kBlock];
    score_block(block, r, is_wanted, scores);
    for (int j = 0; j < count; ++j) y[j] = is_wanted[j] ? scores[j] : -kInfinity;
  }
}

void Head::score_block(int block, int row, const bool* is_wanted, float* scores) const {
  if (!weights_.bf16) return linear_tile(kernels_, weights_.rows, block, codes_, row, scores);
  const int d = weights_.rows.k;
  const float* x = h_RD_.get() + static_cast<std::size_t>(row) * d;
  for (int j = 0; j < kBlock; ++j) {
    const std::uint16_t* w = weights_.bf16 + (static_cast<std::size_t>(block) * kBlock + j) * pad_inputs(d);
    if (is_wanted[j]) kernels_.dot_bf16(w, pad_inputs(d), 1, x, 0, 1, d, scores + j, 0);
  }
}

}  // namespace onebit
