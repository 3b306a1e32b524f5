// Attention over the key-value cache, in vector extensions. A part of lanes.inl, which includes it.
//
//   cache             a block of 64 keys is                        work per 16 key elements and head
//   bf16, fp8         dotted as floats, in lanes                   a product and a sum; the conversion is shared
//   int8              four tiles of Q8; its values are d / 16 more 2 dots of 64 products for each 4 of them; the rest is per key

// ---- Attention ----

// Heads that share one pass over the keys and values.
constexpr int kMaxHeads = 4;

// Asks for a row of d numbers that is needed soon: blocks lie apart, so the machine cannot guess where reading goes on.
template <typename T>
ONEBIT_INLINE void prefetch_row(const T* p, int d) {
  constexpr int kPerLine = 64 / sizeof(T);
  for (int i = 0; i < d; i += kPerLine) __builtin_prefetch(p + i, 0, 2);
}

// Scores of n <= 16 keys; score j of head h goes to scores[h * kBlockTokens + j], and those up to the 16th are set.
template <int kHeads, typename T>
ONEBIT_INLINE void score_keys(const float* q, int d, float inv_sqrt_d, const T* k, std::ptrdiff_t ahead, int n,
                              float* scores) {
  const int whole = d / kLaneCount * kLaneCount;
  Lanes products[kHeads][kLaneCount];
  for (int j = 0; j < n; ++j, k += d) {
    prefetch_row(k + ahead, d);
    Lanes sum[kHeads];
    ONEBIT_UNROLL
    for (int h = 0; h < kHeads; ++h) sum[h] = splat(0.0f);
    for (int c = 0; c < whole; c += kLaneCount) {
      const Lanes key = load_lanes(k + c);
      ONEBIT_UNROLL
      for (int h = 0; h < kHeads; ++h) sum[h] = sum[h] + load_lanes(q + h * d + c) * key;
    }
    if (whole < d) {
      const Lanes key = load_lanes(k + whole, d - whole);
      ONEBIT_UNROLL
      for (int h = 0; h < kHeads; ++h) sum[h] = sum[h] + load_lanes(q + h * d + whole, d - whole) * key;
    }
    ONEBIT_UNROLL
    for (int h = 0; h < kHeads; ++h) products[h][j] = sum[h];
  }
  ONEBIT_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    for (int j = n; j < kLaneCount; ++j) products[h][j] = splat(0.0f);
    store_lanes(scores + h * kBlockTokens, totals(products[h]) * splat(inv_sqrt_d));
  }
}

// Turns the first n scores of a block into weights exp(score - m), m the largest; the rest weigh exp(-infinity) = 0.
// Returns m, and the sum of the weights in *l.
ONEBIT_INLINE float soften(float* scores, int n, float* l) {
  for (int j = n; j < kBlockTokens; ++j) scores[j] = -__builtin_inff();
  // NaN is never larger, and so passed over.
  const auto larger = [](Vector a, Vector b) { return b > a ? b : a; };
  Lanes largest = splat(-__builtin_inff());
  ONEBIT_UNROLL
  for (int j = 0; j < kBlockTokens; j += kLaneCount) largest = map(largest, load_lanes(scores + j), larger);
  ONEBIT_UNROLL
  for (int i = 1; i < kParts; ++i) largest.part[0] = larger(largest.part[0], largest.part[i]);
  const float m = reduce(largest.part[0], larger);

  Lanes sum = splat(0.0f);
  ONEBIT_UNROLL
  for (int j = 0; j < kBlockTokens; j += kLaneCount) {
    const Lanes p = map(load_lanes(scores + j), [=](Vector s) { return exponential(s - m); });
    store_lanes(scores + j, p);
    sum = sum + p;
  }
  *l = total(sum);
  return m;
}

// The factors of two parts whose largest scores are m and m_b, to be merged; m becomes the larger. That one's factor is 1.
ONEBIT_INLINE void merge_factors(float m_b, float* m, float* keep, float* take) {
  const bool is_larger = m_b > *m;
  const float factor = exponential(is_larger ? *m - m_b : m_b - *m);
  *keep = is_larger ? factor : 1.0f;
  *take = is_larger ? 1.0f : factor;
  *m = is_larger ? m_b : *m;
}

// How the block at hand joins the result of the blocks before it.
struct Merge {
  bool is_first;
  float keep;  // factor of the result so far
  float take;  // factor of this block
};

// Adds the weighted values of a block, at d positions [c, c + width), to out.
template <int kHeads, int kChunks, typename T>
ONEBIT_INLINE void mix_values(const float* p, const T* v, std::ptrdiff_t ahead, int d, int n, int width,
                              const Merge* merge, float* out) {
  Lanes sum[kHeads][kChunks];
  ONEBIT_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    ONEBIT_UNROLL
    for (int c = 0; c < kChunks; ++c) sum[h][c] = splat(0.0f);
  }
  const bool is_whole = width == kChunks * kLaneCount;
  for (int j = 0; j < n; ++j, v += d) {
    prefetch_row(v + ahead, width);
    ONEBIT_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const Lanes value = is_whole ? load_lanes(v + c * kLaneCount) : load_lanes(v, width);
      ONEBIT_UNROLL
      for (int h = 0; h < kHeads; ++h) sum[h][c] = sum[h][c] + value * splat(p[h * kBlockTokens + j]);
    }
  }
  ONEBIT_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    ONEBIT_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      float* y = out + h * d + c * kLaneCount;
      const int count = is_whole ? kLaneCount : width;
      Lanes mixed = sum[h][c];
      if (!merge[h].is_first) {
        mixed = load_lanes(y, count) * splat(merge[h].keep) + mixed * splat(merge[h].take);
      }
      store_lanes(y, mixed, count);
    }
  }
}

template <typename T, int kHeads>
void attend_heads(const float* q, int d, float inv_sqrt_d, const void* const* k_blocks, const void* const* v_blocks,
                  int n_keys, float* m, float* l, float* o) noexcept {
  // As many sums as half the registers hold.
  constexpr int kChunks = kParts == 1 ? 4 : 1;
  for (int start = 0; start < n_keys; start += kBlockTokens) {
    const T* k = static_cast<const T*>(k_blocks[start / kBlockTokens]);
    const T* v = static_cast<const T*>(v_blocks[start / kBlockTokens]);
    const std::ptrdiff_t k_ahead = static_cast<const T*>(k_blocks[start / kBlockTokens + 1]) - k;
    const std::ptrdiff_t v_ahead = static_cast<const T*>(v_blocks[start / kBlockTokens + 1]) - v;
    const int n = n_keys - start < kBlockTokens ? n_keys - start : kBlockTokens;

    float p[kHeads * kBlockTokens];
    for (int j = 0; j < n; j += kLaneCount) {
      score_keys<kHeads>(q, d, inv_sqrt_d, k + j * d, k_ahead, n - j < kLaneCount ? n - j : kLaneCount, p + j);
    }

    Merge merge[kHeads];
    ONEBIT_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      float block_l;
      const float block_m = soften(p + h * kBlockTokens, n, &block_l);
      merge[h] = {start == 0, 0.0f, 1.0f};
      if (start == 0) {
        m[h] = block_m;
        l[h] = block_l;
      } else {
        merge_factors(block_m, m + h, &merge[h].keep, &merge[h].take);
        l[h] = l[h] * merge[h].keep + block_l * merge[h].take;
      }
    }

    int c = 0;
    for (; c + kChunks * kLaneCount <= d; c += kChunks * kLaneCount) {
      mix_values<kHeads, kChunks>(p, v + c, v_ahead, d, n, kChunks * kLaneCount, merge, o + c);
    }
    for (; c < d; c += kLaneCount) {
      mix_values<kHeads, 1>(p, v + c, v_ahead, d, n, d - c < kLaneCount ? d - c : kLaneCount, merge, o + c);
    }
  }
}

// attend_heads for the count, at most kHeads, that is known only now.
template <typename T, int kHeads>
void attend_few(const float* q, int heads, int d, float inv_sqrt_d, const void* const* k_blocks,
                const void* const* v_blocks, int n_keys, float* m, float* l, float* o) noexcept {
  if (heads == kHeads) {
    attend_heads<T, kHeads>(q, d, inv_sqrt_d, k_blocks, v_blocks, n_keys, m, l, o);
  } else if constexpr (kHeads > 1) {
    attend_few<T, kHeads - 1>(q, heads, d, inv_sqrt_d, k_blocks, v_blocks, n_keys, m, l, o);
  }
}

template <typename T>
void attend(const float* q, int heads, int d, float inv_sqrt_d, const void* const* k_blocks,
            const void* const* v_blocks, int n_keys, float* m, float* l, float* o) noexcept {
  for (int h = 0; h < heads; h += kMaxHeads) {
    const int count = heads - h < kMaxHeads ? heads - h : kMaxHeads;
    attend_few<T, kMaxHeads>(q + h * d, count, d, inv_sqrt_d, k_blocks, v_blocks, n_keys, m + h, l + h, o + h * d);
  }
}

void merge_splits(int heads, int d, const float* m_b, const float* l_b, const float* o_b, float* m, float* l,
                  float* o) noexcept {
  for (int h = 0; h < heads; ++h, o += d, o_b += d) {
    float keep, take;
    merge_factors(m_b[h], m + h, &keep, &take);
    l[h] = l[h] * keep + l_b[h] * take;
    for (int i = 0; i < d; ++i) o[i] = o[i] * keep + o_b[i] * take;
  }
}

// ---- Attention over int8 ----

// float(hi * 128 + lo) of 16 products.
ONEBIT_INLINE Lanes combine(const std::int32_t* hi, const std::int32_t* lo) {
  Lanes a;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) {
    IntVector high, low;
    __builtin_memcpy(&high, hi + i * kPartLanes, sizeof high);
    __builtin_memcpy(&low, lo + i * kPartLanes, sizeof low);
    a.part[i] = __builtin_convertvector((high << 7) + low, Vector);
  }
  return a;
}

void weigh_int8(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const float* k_scale,
                const float* v_scale, float q_scale, int n, Int8Weights* weights, float* m, float* l) noexcept {
  float w[kBlockTokens];
  for (int j = 0; j < n; j += kLaneCount, hi += ld, lo += ld) {
    store_lanes(w + j, (combine(hi, lo) * load_lanes(k_scale + j)) * splat(q_scale));
  }
  float block_l;
  const float block_m = soften(w, n, &block_l);
  merge_factors(block_m, m, &weights->keep, &weights->take);
  *l = *l * weights->keep + block_l * weights->take;

  for (int j = 0; j < kBlockTokens; ++j) w[j] = w[j] * v_scale[j];
  // The scales of slots that nobody has written may be anything.
  for (int j = n; j < kBlockTokens; ++j) w[j] = 0.0f;
  const float largest = largest_magnitude(w, kBlockTokens, 0.0f);
  weights->scale = largest / 16256.0f;
  const float factor = 16256.0f / largest;
  IntVector hi_sum = {};
  IntVector lo_sum = {};
  ONEBIT_UNROLL
  for (int j = 0; j < kBlockTokens; j += kPartLanes) {
    Vector part;
    __builtin_memcpy(&part, w + j, sizeof part);
    const Code15 code = split15(part * factor);
    hi_sum += code.hi;
    lo_sum += code.lo;
    store_bytes(weights->hi + j, code.hi);
    store_bytes(weights->lo + j, code.lo);
  }
  const auto plus = [](IntVector a, IntVector b) { return a + b; };
  weights->hi_sum = reduce(hi_sum, plus);
  weights->lo_sum = reduce(lo_sum, plus);
}

void mix_int8(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const Int8Weights& weights, int d,
              float* o) noexcept {
  const Lanes keep = splat(weights.keep);
  const Lanes take = splat(weights.take);
  const Lanes scale = splat(weights.scale);
  for (int i = 0; i < d; i += kLaneCount, hi += ld, lo += ld) {
    const int count = d - i < kLaneCount ? d - i : kLaneCount;
    store_lanes(o + i, load_lanes(o + i, count) * keep + (combine(hi, lo) * scale) * take, count);
  }
}
