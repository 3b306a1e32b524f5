// Tiles times activations for every table with vpdpbusd, which adds 4 products u8 * s8 to each int32 lane. Written once
// in vector extensions and compiled per instruction set.
//
// Included after lanes.inl, inside a namespace of its own, by a file that has set kAccumulators: registers that may hold
// sums.
//
// A unit is 64 bytes, one register of 512 bits or two of 256 ("halves"): lane r holds rows 16 * j + r at 4 consecutive
// inputs, one row group j per digit of the byte. One broadcast of 4 activations serves all lanes, and lane r of an
// accumulator is a row: no horizontal sum.
//
//   byte        0    1    2    3   |  4    5    6    7   | ... |  60   61   62   63
//   lane, k   r0,k0   k1   k2   k3 | r1,k0   k1   k2   k3 | ... | r15,k0  k1   k2   k3
//
// No digit is ever extracted. "Planes" that contain the digit on top of lower ones, or below a power of two, are dotted
// instead, and rows are differences of plane sums, because a dot product is linear:
//
//   layout   planes of a byte x                rows from plane sums D, S = sum of activations    dots + other per unit
//   T80      x_0 = x, x_{i+1} = 3 x_i mod 256  ((3 D_i - D_{i+1}) >> 8) - S                      6 + 10 for 320 weights
//   R64      x & 3, x & 15, x & 63, x          ((D_j - D_{j-1}) >> 2 j) - S                      4 + 3 for 256
//   B128     x & 1, x & 3, ..., x & 127, x     2 ((D_j - D_{j-1}) >> j) - S                      8 + 7 for 512
//   Q8       x                                 D - 128 S                                         1 + 0 for 64
//   Q4       x & 15, x                         ((D_j - D_{j-1}) >> 4 j) - 8 S                    2 + 1 for 128
//
// T80: the digit is t_i = (3 x_i - x_{i+1}) / 256, exactly. Sums may wrap: what counts is that 256 times a row's sum of
// t * activation fits in 32 bits, which holds to 33000 inputs. With many tokens the sixth dot costs more than digits do,
// which are then taken once per tile, into scratch.

using Bytes = std::uint8_t __attribute__((vector_size(kVectorBytes)));

constexpr int kUnitBytes = 64;
constexpr int kHalves = kUnitBytes / kVectorBytes;
// Far enough ahead of one token's stream to hide the latency of memory; into L2, which holds it.
constexpr int kPrefetchBytes = 8192;

// GCC copies the accumulator around the intrinsic; the instruction itself costs nothing extra.
ONEBIT_INLINE BitsVector dot4(BitsVector sum, BitsVector w, BitsVector x) {
#if defined(__clang__) && defined(__AVX512VNNI__)
  return (BitsVector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__clang__)
  return (BitsVector)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#else
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  return sum;
#endif
}

// The mask has a name: under -fsanitize=undefined g++ takes the cast for an int, and refuses to narrow it.
// By way of a variable, which GCC keeps in a register.
ONEBIT_INLINE Bytes load_bytes(const std::uint8_t* p) {
  Bytes x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

ONEBIT_INLINE Bytes below(Bytes x, int bits) {
  const std::uint8_t mask = (1 << bits) - 1;
  return x & mask;
}

// The digit that b has on top of a: (b - a) >> bits.
ONEBIT_INLINE BitsVector difference(BitsVector b, BitsVector a, int bits) {
  return (BitsVector)((IntVector)(b - a) >> bits);
}

// One struct per layout. kOffset: what a row's sum holds too much of S. split: the planes of a half unit. row: the
// exact sum of row group j, from the plane sums d and s = kOffset * S.
struct T80 {
  static constexpr int kGroups = 5;
  static constexpr int kPlanes = 6;
  static constexpr int kOffset = 1;
  static constexpr int kStride = kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) {
    plane[0] = load_bytes(p);
    ONEBIT_UNROLL
    for (int i = 1; i < kPlanes; ++i) plane[i] = plane[i - 1] + plane[i - 1] + plane[i - 1];
  }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int j, BitsVector s) {
    return difference(d[j] + d[j] + d[j], d[j + 1], 8) - s;
  }
};

// The digits of T80 units, one after the other: 5 * 64 bytes per unit.
struct T80Digits {
  static constexpr int kGroups = 5;
  static constexpr int kPlanes = 5;
  static constexpr int kOffset = 1;
  static constexpr int kStride = kGroups * kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) {
    ONEBIT_UNROLL
    for (int i = 0; i < kPlanes; ++i) plane[i] = load_bytes(p + i * kUnitBytes);
  }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int j, BitsVector s) { return d[j] - s; }
};

struct R64 {
  static constexpr int kGroups = 4;
  static constexpr int kPlanes = 4;
  static constexpr int kOffset = 1;
  static constexpr int kStride = kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) {
    plane[3] = load_bytes(p);
    ONEBIT_UNROLL
    for (int j = 0; j < 3; ++j) plane[j] = below(plane[3], 2 * j + 2);
  }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int j, BitsVector s) {
    return (j == 0 ? d[0] : difference(d[j], d[j - 1], 2 * j)) - s;
  }
};

struct B128 {
  static constexpr int kGroups = 8;
  static constexpr int kPlanes = 8;
  static constexpr int kOffset = 1;
  static constexpr int kStride = kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) {
    plane[7] = load_bytes(p);
    ONEBIT_UNROLL
    for (int j = 0; j < 7; ++j) plane[j] = below(plane[7], j + 1);
  }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int j, BitsVector s) {
    const BitsVector ones = j == 0 ? d[0] : difference(d[j], d[j - 1], j);
    return ones + ones - s;
  }
};

struct Q8 {
  static constexpr int kGroups = 1;
  static constexpr int kPlanes = 1;
  static constexpr int kOffset = 128;
  static constexpr int kStride = kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) { plane[0] = load_bytes(p); }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int, BitsVector s) { return d[0] - s; }
};

struct Q4 {
  static constexpr int kGroups = 2;
  static constexpr int kPlanes = 2;
  static constexpr int kOffset = 8;
  static constexpr int kStride = kUnitBytes;

  static ONEBIT_INLINE void split(const std::uint8_t* p, Bytes* plane) {
    plane[1] = load_bytes(p);
    plane[0] = below(plane[1], 4);
  }

  static ONEBIT_INLINE BitsVector row(const BitsVector* d, int j, BitsVector s) {
    return (j == 0 ? d[0] : difference(d[1], d[0], 4)) - s;
  }
};

// One tile for exactly kM tokens. Without sums, adds to out. One unit after the other: two at a time, the loads and
// prefetches of one token halve what memory delivers on Granite Rapids.
template <typename Layout, int kM>
void dot_tokens(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int k,
                std::int32_t* out) noexcept {
  // One token is read as one stream, so both halves go together where registers allow.
  constexpr int kTogether = kM == 1 && kHalves * Layout::kPlanes <= kAccumulators ? kHalves : 1;
  for (int half = 0; half < kHalves; half += kTogether) {
    BitsVector sum[kM][kTogether][Layout::kPlanes];
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int h = 0; h < kTogether; ++h) {
        ONEBIT_UNROLL
        for (int p = 0; p < Layout::kPlanes; ++p) sum[i][h][p] = BitsVector{};
      }
    }

    const std::uint8_t* unit = tile + half * kVectorBytes;
    for (int kk = 0; kk < k; kk += 4, unit += Layout::kStride) {
      if constexpr (kM <= 4 && Layout::kStride == kUnitBytes) __builtin_prefetch(unit + kPrefetchBytes, 0, 2);
      ONEBIT_UNROLL
      for (int h = 0; h < kTogether; ++h) {
        Bytes plane[Layout::kPlanes];
        Layout::split(unit + h * kVectorBytes, plane);
        ONEBIT_UNROLL
        for (int i = 0; i < kM; ++i) {
          std::uint32_t four;
          __builtin_memcpy(&four, x + i * ldx + kk, sizeof four);
          const BitsVector activations = four - BitsVector{};
          ONEBIT_UNROLL
          for (int p = 0; p < Layout::kPlanes; ++p) {
            sum[i][h][p] = dot4(sum[i][h][p], (BitsVector)plane[p], activations);
          }
        }
      }
    }

    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      const std::uint32_t s = sums ? static_cast<std::uint32_t>(sums[i]) * Layout::kOffset : 0;
      ONEBIT_UNROLL
      for (int h = 0; h < kTogether; ++h) {
        ONEBIT_UNROLL
        for (int j = 0; j < Layout::kGroups; ++j) {
          std::int32_t* y = out + (i * Layout::kGroups + j) * kLaneCount + (half + h) * kPartLanes;
          BitsVector row = Layout::row(sum[i][h], j, s - BitsVector{});
          if (!sums) {
            BitsVector before;
            __builtin_memcpy(&before, y, sizeof before);
            row += before;
          }
          __builtin_memcpy(y, &row, sizeof row);
        }
      }
    }
  }
}

// dot_tokens for the count, at most kM, that is known only now.
template <typename Layout, int kM>
void dot_few(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m, int k,
             std::int32_t* out) noexcept {
  if (m == kM) {
    dot_tokens<Layout, kM>(tile, x, ldx, sums, k, out);
  } else if constexpr (kM > 1) {
    dot_few<Layout, kM - 1>(tile, x, ldx, sums, m, k, out);
  }
}

template <typename Layout>
void dot_tile(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m,
              int k, std::int32_t* out) noexcept {
  // As many as keep all plane sums in registers, and as attention over an int8 cache has in one step.
  constexpr int kTokens = kAccumulators / Layout::kPlanes < 8 ? kAccumulators / Layout::kPlanes : 8;
  for (int i = 0; i < m; i += kTokens) {
    const int count = m - i < kTokens ? m - i : kTokens;
    dot_few<Layout, kTokens>(tile, x + i * ldx, ldx, sums ? sums + i : nullptr, count, k,
                             out + i * Layout::kGroups * kLaneCount);
  }
}

// Two tiles of Q8 for exactly kM tokens: each activation that is loaded serves both.
template <int kM>
void dot_pair_tokens(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, const std::int8_t* x, std::ptrdiff_t ldx,
                     const std::int32_t* sums, int k, std::int32_t* out, std::ptrdiff_t next_out) noexcept {
  BitsVector sum[kM][2];
  ONEBIT_UNROLL
  for (int i = 0; i < kM; ++i) sum[i][0] = sum[i][1] = BitsVector{};
  for (int kk = 0; kk < k; kk += 4, tiles += kUnitBytes) {
    const Bytes first = load_bytes(tiles);
    const Bytes second = load_bytes(tiles + tile_bytes);
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      std::uint32_t four;
      __builtin_memcpy(&four, x + i * ldx + kk, sizeof four);
      const BitsVector activations = four - BitsVector{};
      sum[i][0] = dot4(sum[i][0], (BitsVector)first, activations);
      sum[i][1] = dot4(sum[i][1], (BitsVector)second, activations);
    }
  }
  ONEBIT_UNROLL
  for (int i = 0; i < kM; ++i) {
    const BitsVector s = static_cast<std::uint32_t>(sums[i]) * Q8::kOffset - BitsVector{};
    ONEBIT_UNROLL
    for (int j = 0; j < 2; ++j) {
      const BitsVector row = sum[i][j] - s;
      __builtin_memcpy(out + i * kLaneCount + j * next_out, &row, sizeof row);
    }
  }
}

template <int kM>
void dot_pair_few(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, const std::int8_t* x, std::ptrdiff_t ldx,
                  const std::int32_t* sums, int m, int k, std::int32_t* out, std::ptrdiff_t next_out) noexcept {
  if (m == kM) {
    dot_pair_tokens<kM>(tiles, tile_bytes, x, ldx, sums, k, out, next_out);
  } else if constexpr (kM > 1) {
    dot_pair_few<kM - 1>(tiles, tile_bytes, x, ldx, sums, m, k, out, next_out);
  }
}

// With whole units in registers only: halves would not leave enough of them.
template <int kTokens>
void dot_pair(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, const std::int8_t* x, std::ptrdiff_t ldx,
              const std::int32_t* sums, int m, int k, std::int32_t* out, std::ptrdiff_t next_out) noexcept {
  static_assert(kHalves * kTokens == kTokens);
  for (int i = 0; i < m; i += kTokens) {
    const int count = m - i < kTokens ? m - i : kTokens;
    dot_pair_few<kTokens>(tiles, tile_bytes, x + i * ldx, ldx, sums + i, count, k, out + i * kLaneCount, next_out);
  }
}

// From this many tokens on, taking the digits of T80 pays.
constexpr int kDigitTokens = 12;
// Inputs whose digits are taken at a time: 80 bytes of stack each.
constexpr int kDigitInputs = 1024;

inline void unpack_digits(const std::uint8_t* tile, int k, std::uint8_t* digits) noexcept {
  for (int unit = 0; unit < k / 4; ++unit, tile += kUnitBytes, digits += T80Digits::kStride) {
    ONEBIT_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      Bytes plane[T80::kPlanes];
      T80::split(tile + half * kVectorBytes, plane);
      ONEBIT_UNROLL
      for (int j = 0; j < T80::kGroups; ++j) {
        // 3 x / 256, where a true comparison is -1.
        const Bytes digit = -((Bytes)(plane[j] > 85) + (Bytes)(plane[j] > 170));
        __builtin_memcpy(digits + j * kUnitBytes + half * kVectorBytes, &digit, sizeof digit);
      }
    }
  }
}

inline void dot_tile_t80(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums,
                         int m, int k, std::int32_t* out) noexcept {
  if (m < kDigitTokens) return dot_tile<T80>(tile, x, ldx, sums, m, k, out);
  alignas(64) std::uint8_t digits[kDigitInputs / 4 * T80Digits::kStride];
  for (int kk = 0; kk < k; kk += kDigitInputs) {
    const int count = k - kk < kDigitInputs ? k - kk : kDigitInputs;
    unpack_digits(tile + kk / 4 * kUnitBytes, count, digits);
    dot_tile<T80Digits>(digits, x + kk, ldx, kk == 0 ? sums : nullptr, m, count, out);
  }
}
