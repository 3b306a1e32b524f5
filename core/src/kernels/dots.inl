// Rows of bfloat16 times vectors of floats, in vector extensions: full-precision layers, heads and adapters. A part of
// lanes.inl, which includes it.
//
//   tokens         a block of 4 rows is            work per 16 inputs of a row and token
//   1              one token at a time             a load, two steps to widen it, a product and a sum
//   from 4         4 tokens at a time              a quarter of the loads and of the widening
//   from 32        widened once for 64 or more     a product and a sum

// n <= 16 products of each row and each token, added to sum[t][i].
template <int kRows, int kTokens, typename T>
ONEBIT_INLINE void add_products(const T* w, std::ptrdiff_t ldw, const float* x, std::ptrdiff_t ldx, int n,
                                Lanes (*sum)[kRows]) {
  Lanes row[kRows];
  ONEBIT_UNROLL
  for (int i = 0; i < kRows; ++i) row[i] = load_lanes(w + i * ldw, n);
  ONEBIT_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const Lanes input = load_lanes(x + t * ldx, n);
    ONEBIT_UNROLL
    for (int i = 0; i < kRows; ++i) sum[t][i] = sum[t][i] + row[i] * input;
  }
}

// Sums of kRows rows with kTokens tokens over k inputs, those of row i and token t in sums[t * ld + i]; they go on from
// what is there, or begin at +0.
template <int kRows, int kTokens, bool kGoOn, typename T>
ONEBIT_INLINE void sum_block(const T* w, std::ptrdiff_t ldw, const float* x, std::ptrdiff_t ldx, int k, Lanes* sums,
                             int ld) {
  Lanes sum[kTokens][kRows];
  ONEBIT_UNROLL
  for (int i = 0; i < kTokens * kRows; ++i) {
    sum[i / kRows][i % kRows] = kGoOn ? sums[i / kRows * ld + i % kRows] : splat(0.0f);
  }
  int j = 0;
  for (; j + kLaneCount <= k; j += kLaneCount) add_products<kRows, kTokens>(w + j, ldw, x + j, ldx, kLaneCount, sum);
  if (j < k) add_products<kRows, kTokens>(w + j, ldw, x + j, ldx, k - j, sum);
  ONEBIT_UNROLL
  for (int i = 0; i < kTokens * kRows; ++i) sums[i / kRows * ld + i % kRows] = sum[i / kRows][i % kRows];
}

// One token: enough independent sums to hide the latency of an addition.
ONEBIT_INLINE void dot_token(const Bf16* w, std::ptrdiff_t ldw, const float* x, int n, int k, float* y) {
  constexpr int kRows = 4;
  Lanes sums[kLaneCount];
  int i = 0;
  // Where rows are short, as those of an adapter, most of the work is in their totals: 16 together take fewer steps.
  for (; i + kLaneCount <= n; i += kLaneCount) {
    for (int j = 0; j < kLaneCount; j += kRows) {
      sum_block<kRows, 1, false>(w + (i + j) * ldw, ldw, x, 0, k, sums + j, 0);
    }
    store_lanes(y + i, totals(sums));
  }
  for (; i + kRows <= n; i += kRows) {
    sum_block<kRows, 1, false>(w + i * ldw, ldw, x, 0, k, sums, 0);
    for (int j = 0; j < kRows; ++j) y[i + j] = total(sums[j]);
  }
  for (; i < n; ++i) {
    sum_block<1, 1, false>(w + i * ldw, ldw, x, 0, k, sums, 0);
    y[i] = total(sums[0]);
  }
}

// 4 rows and 4 tokens have 16 totals, which are made together.
constexpr int kDotBlock = 4;
// Widened rows stay in the nearest cache: so many inputs at a time, for so many tokens. Fewer tokens than the last are
// done before their rows were widened.
constexpr int kDotTokens = 64;
constexpr int kDotInputs = 768;
constexpr int kWidenFrom = 32;
constexpr int kMaxDotTokens = kDotTokens + kWidenFrom;  // the last of many, with the few that would be left

// Sums of 4 rows with 4 tokens over n inputs, sums[t * 4 + i]; they go on from what is there, or begin at +0.
template <bool kGoOn, typename T>
ONEBIT_INLINE void sum_tokens(const T* w, std::ptrdiff_t ldw, const float* x, std::ptrdiff_t ldx, int n, Lanes* sums) {
  // As many sums at a time as there are registers for.
  constexpr int kPart = kParts == 1 ? kDotBlock : 2;
  for (int t = 0; t < kDotBlock; t += kPart) {
    for (int i = 0; i < kDotBlock; i += kPart) {
      sum_block<kPart, kPart, kGoOn>(w + i * ldw, ldw, x + t * ldx, ldx, n, sums + t * kDotBlock + i, kDotBlock);
    }
  }
}

// y[t * ldy + i] for 4 rows and 4 tokens. Overwrites sums.
ONEBIT_INLINE void store_totals(Lanes* sums, float* y, std::ptrdiff_t ldy) {
  float values[kLaneCount];
  store_lanes(values, totals(sums));
  for (int t = 0; t < kDotBlock; ++t) __builtin_memcpy(y + t * ldy, values + t * kDotBlock, kDotBlock * sizeof *y);
}

// y[t * ldy + i] for 4 rows and m < kMaxDotTokens tokens, a multiple of 4.
ONEBIT_INLINE void dot_tokens(const Bf16* w, std::ptrdiff_t ldw, const float* x, std::ptrdiff_t ldx, int m, int k,
                              float* y, std::ptrdiff_t ldy) {
  Lanes sums[kMaxDotTokens * kDotBlock];
  if (m < kWidenFrom) {
    for (int t = 0; t < m; t += kDotBlock) {
      sum_tokens<false>(w, ldw, x + t * ldx, ldx, k, sums);
      store_totals(sums, y + t * ldy, ldy);
    }
    return;
  }
  alignas(64) float rows[kDotBlock * kDotInputs];
  for (int begin = 0; begin < k; begin += kDotInputs) {
    const int n = k - begin < kDotInputs ? k - begin : kDotInputs;
    for (int i = 0; i < kDotBlock; ++i) {
      for (int j = 0; j < n; j += kLaneCount) {
        const int count = n - j < kLaneCount ? n - j : kLaneCount;
        store_lanes(rows + i * kDotInputs + j, load_lanes(w + i * ldw + begin + j, count));
      }
    }
    for (int t = 0; t < m; t += kDotBlock) {
      const float* input = x + t * ldx + begin;
      Lanes* sum = sums + t * kDotBlock;
      // In parts a block that begins at +0 would have no register left: it goes on from zeros in memory.
      if (kParts == 1 && begin == 0) {
        sum_tokens<false>(rows, kDotInputs, input, ldx, n, sum);
      } else {
        for (int i = 0; begin == 0 && i < kLaneCount; ++i) sum[i] = splat(0.0f);
        sum_tokens<true>(rows, kDotInputs, input, ldx, n, sum);
      }
      if (begin + n == k) store_totals(sum, y + t * ldy, ldy);
    }
  }
}

void dot_bf16(const std::uint16_t* rows, std::ptrdiff_t ldw, int n, const float* x, std::ptrdiff_t ldx, int m, int k,
              float* y, std::ptrdiff_t ldy) noexcept {
  const Bf16* w = reinterpret_cast<const Bf16*>(rows);
  while (m >= kDotBlock) {
    const int group = m < kMaxDotTokens ? m / kDotBlock * kDotBlock : kDotTokens;
    int i = 0;
    for (; i + kDotBlock <= n; i += kDotBlock) dot_tokens(w + i * ldw, ldw, x, ldx, group, k, y + i, ldy);
    for (int t = 0; i < n && t < group; ++t) dot_token(w + i * ldw, ldw, x + t * ldx, n - i, k, y + t * ldy + i);
    m -= group;
    x += group * ldx;
    y += group * ldy;
  }
  for (; m > 0; --m, x += ldx, y += ldy) dot_token(w, ldw, x, n, k, y);
}
