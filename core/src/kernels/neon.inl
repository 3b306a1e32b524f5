// Tiles times activations for every table with sdot, which adds 4 products s8 * s8 to each int32 lane.
//
// Included after lanes.inl, inside a namespace of its own. The file that includes it gives `Many`, see dot_many.
//
// A unit is 64 bytes, four registers ("quads"): lane r of the unit holds rows 16 * j + r at 4 consecutive inputs, one
// row group j per digit of the byte. sdot takes 4 of the 16 activations of a register for all its lanes, so one load of
// them serves four units, and a lane of an accumulator is a row: no horizontal sum.
//
//   quad 0   r0 k0..k3 | r1 | r2 | r3     quad 1   r4 | r5 | r6 | r7     quad 2   r8 ..     quad 3   r12 .. r15
//
// Few tokens: "planes" of the bytes, signed and seldom single digits, are dotted, and rows follow from the plane sums
// D, because a dot product is linear. S is the sum of the activations. Operations are those on registers, per quad:
//
//   layout   planes of a byte x              rows                                                 dots + other
//   T80      z_0 = x ^ 128, z_{i+1} = 3 z_i  (3 D_i - D_{i+1}) >> 8                               6 + 6 for 80 weights
//   R64      x & 3, x & 12, x & 48, x >> 6   D_0 - S, (D_1 >> 2) - S, (D_2 >> 4) - S, D_3 - S     4 + 4 for 64
//   B128     z_j = x << j                    2 B_j - S, B_j = B_{j+1} + ((D_{j+1} - 2 D_j) >> 8)  8 + 7 for 128
//   Q8       x ^ 128                         D                                                    1 + 1 for 16
//   Q4       x & 15, x >> 4                  D_j - 8 S                                            2 + 2 for 32
//
// T80: let z = u - 128, where u is the byte times a power of 3, modulo 256. With 3 * 128 = 128 modulo 256, z_{i+1} is
// 3 z_i as it wraps, and 3 z_i - z_{i+1} = 256 (t_i - 1). B128: bit b_j tops x << j, which as signed is 256 b_j too
// small, so 2 z_j - z_{j+1} = 256 (b_{j+1} - b_j), and b_8 = 0. Sums may wrap: 256 times a row's sum fits in 32 bits to
// 33000 inputs.
//
// Many tokens: the weights of some inputs are unpacked into scratch in L1, as signed bytes, and multiplied as they are.

using Bytes = std::uint8_t __attribute__((vector_size(kVectorBytes)));
using Codes = std::int8_t __attribute__((vector_size(kVectorBytes)));

constexpr int kUnitBytes = 64;
constexpr int kQuads = kUnitBytes / kVectorBytes;
// Inputs per register of activations, and per round of the inner loops.
constexpr int kRoundInputs = 16;
// Far enough ahead of one token's stream to hide the latency of memory.
constexpr int kPrefetchBytes = 8192;

template <typename T>
ONEBIT_INLINE T load(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <typename T>
ONEBIT_INLINE void store(void* p, T x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// Four inputs of each lane's row times activations 4 * kLane .. 4 * kLane + 3.
template <int kLane>
ONEBIT_INLINE BitsVector dot4(BitsVector sum, Codes w, Codes x) {
  return (BitsVector)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x, kLane);
}

ONEBIT_INLINE BitsVector shift_right(BitsVector x, int bits) { return (BitsVector)((IntVector)x >> bits); }

// One struct per layout. kTokens: as many as keep all plane sums in registers, beside activations and masks. split: the
// planes of a quad. rows: the exact sums of the row groups from the plane sums and S. unpack: the weights of a quad.
struct T80 {
  static constexpr int kGroups = 5;
  static constexpr int kPlanes = 6;
  static constexpr int kTokens = 4;

  static ONEBIT_INLINE void split(Bytes x, Codes* plane) {
    plane[0] = (Codes)(x ^ 128);
    // One multiplication, or a shift and an addition: the compiler knows its CPU.
    ONEBIT_UNROLL
    for (int i = 1; i < kPlanes; ++i) plane[i] = plane[i - 1] * 3;
  }

  static ONEBIT_INLINE void rows(const BitsVector* d, BitsVector, BitsVector* y) {
    ONEBIT_UNROLL
    for (int j = 0; j < kGroups; ++j) y[j] = shift_right(d[j] + d[j] + d[j] - d[j + 1], 8);
  }

  static ONEBIT_INLINE void unpack(Bytes x, Codes* w) {
    Codes plane[kPlanes];
    split(x, plane);
    // The digit rounds 3 z / 256; a true comparison is -1.
    ONEBIT_UNROLL
    for (int j = 0; j < kGroups; ++j) w[j] = (Codes)(plane[j] < -42) - (Codes)(plane[j] > 42);
  }
};

struct R64 {
  static constexpr int kGroups = 4;
  static constexpr int kPlanes = 4;
  static constexpr int kTokens = 5;

  static ONEBIT_INLINE void split(Bytes x, Codes* plane) {
    plane[0] = (Codes)(x & 3);
    plane[1] = (Codes)(x & 3 << 2);
    plane[2] = (Codes)(x & 3 << 4);
    plane[3] = (Codes)(x >> 6);
  }

  static ONEBIT_INLINE void rows(const BitsVector* d, BitsVector s, BitsVector* y) {
    y[0] = d[0] - s;
    y[1] = shift_right(d[1], 2) - s;
    y[2] = shift_right(d[2], 4) - s;
    y[3] = d[3] - s;
  }

  static ONEBIT_INLINE void unpack(Bytes x, Codes* w) {
    ONEBIT_UNROLL
    for (int j = 0; j < kGroups; ++j) w[j] = (Codes)(x >> 2 * j & 3) - 1;
  }
};

struct B128 {
  static constexpr int kGroups = 8;
  static constexpr int kPlanes = 8;
  static constexpr int kTokens = 3;

  static ONEBIT_INLINE void split(Bytes x, Codes* plane) {
    ONEBIT_UNROLL
    for (int j = 0; j < kPlanes; ++j, x += x) plane[j] = (Codes)x;
  }

  // Bit 7 of x << j is bit 7 - j of x.
  static ONEBIT_INLINE void rows(const BitsVector* d, BitsVector s, BitsVector* y) {
    BitsVector ones = shift_right(-(d[7] + d[7]), 8);
    y[0] = ones + ones - s;
    ONEBIT_UNROLL
    for (int j = kPlanes - 2; j >= 0; --j) {
      ones += shift_right(d[j + 1] - d[j] - d[j], 8);
      y[7 - j] = ones + ones - s;
    }
  }

  static ONEBIT_INLINE void unpack(Bytes x, Codes* w) {
    ONEBIT_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      const std::uint8_t bit = 1 << j;
      // A true comparison is -1 and stays so; 0 becomes 1.
      w[j] = (Codes)((x & bit) == 0) | 1;
    }
  }
};

struct Q8 {
  static constexpr int kGroups = 1;
  static constexpr int kPlanes = 1;
  static constexpr int kTokens = 8;

  static ONEBIT_INLINE void split(Bytes x, Codes* plane) { plane[0] = (Codes)(x ^ 128); }

  static ONEBIT_INLINE void rows(const BitsVector* d, BitsVector, BitsVector* y) { y[0] = d[0]; }

  static ONEBIT_INLINE void unpack(Bytes x, Codes* w) { split(x, w); }
};

struct Q4 {
  static constexpr int kGroups = 2;
  static constexpr int kPlanes = 2;
  static constexpr int kTokens = 8;

  static ONEBIT_INLINE void split(Bytes x, Codes* plane) {
    plane[0] = (Codes)(x & 15);
    plane[1] = (Codes)(x >> 4);
  }

  static ONEBIT_INLINE void rows(const BitsVector* d, BitsVector s, BitsVector* y) {
    y[0] = d[0] - 8 * s;
    y[1] = d[1] - 8 * s;
  }

  static ONEBIT_INLINE void unpack(Bytes x, Codes* w) {
    split(x, w);
    w[0] -= 8;
    w[1] -= 8;
  }
};

// ---- Few tokens ----

// Adds kTogether quads of the unit whose inputs are number kLane of this round.
template <typename Layout, int kLane, int kM, int kTogether>
ONEBIT_INLINE void add_unit(const std::uint8_t* quads, const Codes* x, BitsVector (*sum)[kTogether][Layout::kPlanes]) {
  const std::uint8_t* p = quads + kLane * kUnitBytes;
  // One unit after the other: GCC would load all four first, and then lack registers.
  __asm__ volatile("" ::: "memory");
  if constexpr (kM <= 2) __builtin_prefetch(p + kPrefetchBytes);
  ONEBIT_UNROLL
  for (int q = 0; q < kTogether; ++q) {
    Codes plane[Layout::kPlanes];
    Layout::split(load<Bytes>(p + q * kVectorBytes), plane);
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int j = 0; j < Layout::kPlanes; ++j) sum[i][q][j] = dot4<kLane>(sum[i][q][j], plane[j], x[i]);
    }
  }
}

// One tile for exactly kM tokens.
template <typename Layout, int kM>
void dot_tokens(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int k,
                std::int32_t* out) noexcept {
  constexpr int kPlanes = Layout::kPlanes;
  // As many quads of a unit as leave registers free, so that few tokens read one stream and have many sums under way.
  constexpr int kFit = 16 / (kM * kPlanes);
  constexpr int kTogether = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  for (int quad = 0; quad < kQuads; quad += kTogether) {
    BitsVector sum[kM][kTogether][kPlanes];
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int q = 0; q < kTogether; ++q) {
        ONEBIT_UNROLL
        for (int j = 0; j < kPlanes; ++j) sum[i][q][j] = BitsVector{};
      }
    }

    const std::uint8_t* quads = tile + quad * kVectorBytes;
    for (int kk = 0; kk < k; kk += kRoundInputs, quads += kRoundInputs / 4 * kUnitBytes) {
      Codes codes[kM];
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) codes[i] = load<Codes>(x + i * ldx + kk);
      add_unit<Layout, 0, kM>(quads, codes, sum);
      add_unit<Layout, 1, kM>(quads, codes, sum);
      add_unit<Layout, 2, kM>(quads, codes, sum);
      add_unit<Layout, 3, kM>(quads, codes, sum);
    }

    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      const BitsVector s = static_cast<std::uint32_t>(sums[i]) - BitsVector{};
      ONEBIT_UNROLL
      for (int q = 0; q < kTogether; ++q) {
        BitsVector rows[Layout::kGroups];
        Layout::rows(sum[i][q], s, rows);
        std::int32_t* y = out + i * Layout::kGroups * kLaneCount + (quad + q) * kPartLanes;
        ONEBIT_UNROLL
        for (int j = 0; j < Layout::kGroups; ++j) store(y + j * kLaneCount, rows[j]);
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

// ---- Many tokens ----

// Inputs that are unpacked at a time: at most 32 KB of stack.
constexpr int kManyInputs = 256;
// Tokens that are multiplied at a time.
constexpr int kManyTokens = 4;
// A pair of units of one row group, unpacked: 8 inputs of 16 rows. Each quad of the first unit is followed by that of
// the second, or what Many::order makes of the two.
constexpr int kPairBytes = 2 * kUnitBytes;

template <typename Layout, typename Many>
ONEBIT_INLINE void unpack_units(const std::uint8_t* tile, int k, std::int8_t (*weights)[kManyInputs * kLaneCount]) {
  for (int pair = 0; pair < k / 8; ++pair, tile += kPairBytes) {
    ONEBIT_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      Bytes quad[2] = {load<Bytes>(tile + q * kVectorBytes), load<Bytes>(tile + kUnitBytes + q * kVectorBytes)};
      Many::order(quad);
      ONEBIT_UNROLL
      for (int h = 0; h < 2; ++h) {
        Codes w[Layout::kGroups];
        Layout::unpack(quad[h], w);
        ONEBIT_UNROLL
        for (int j = 0; j < Layout::kGroups; ++j) {
          store(weights[j] + pair * kPairBytes + (2 * q + h) * kVectorBytes, w[j]);
        }
      }
    }
  }
}

// out = or += the sums of a row group for m <= kM tokens, whose rows in out lie ld apart.
template <typename Many, int kM>
ONEBIT_INLINE void dot_block(const std::int8_t* weights, const std::int8_t* x, std::ptrdiff_t ldx, int m, int k,
                             bool accumulate, std::int32_t* out, int ld) {
  if (m == kM) {
    BitsVector sum[kM][kQuads];
    Many::template dot<kM>(weights, x, ldx, k, sum);
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        std::int32_t* y = out + i * ld + q * kPartLanes;
        store(y, accumulate ? sum[i][q] + load<BitsVector>(y) : sum[i][q]);
      }
    }
  } else if constexpr (kM > 1) {
    dot_block<Many, kM - 1>(weights, x, ldx, m, k, accumulate, out, ld);
  }
}

// Many: how a row group of unpacked weights is multiplied. kFrom: the number of tokens from which unpacking pays.
// order: in which order the bytes of two quads are wanted. dot<kM>: the sums of k inputs for kM <= kManyTokens tokens.
template <typename Layout, typename Many>
void dot_many(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, int m, int k,
              std::int32_t* out) noexcept {
  alignas(64) std::int8_t weights[Layout::kGroups][kManyInputs * kLaneCount];
  constexpr int kRows = Layout::kGroups * kLaneCount;
  for (int kk = 0; kk < k; kk += kManyInputs) {
    const int count = k - kk < kManyInputs ? k - kk : kManyInputs;
    unpack_units<Layout, Many>(tile + kk / 4 * kUnitBytes, count, weights);
    for (int i = 0; i < m; i += kManyTokens) {
      const int tokens = m - i < kManyTokens ? m - i : kManyTokens;
      for (int j = 0; j < Layout::kGroups; ++j) {
        dot_block<Many, kManyTokens>(weights[j], x + i * ldx + kk, ldx, tokens, count, kk > 0,
                                     out + i * kRows + j * kLaneCount, kRows);
      }
    }
  }
}

template <typename Layout, typename Many>
void dot_tile(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m,
              int k, std::int32_t* out) noexcept {
  if (m >= Many::kFrom) return dot_many<Layout, Many>(tile, x, ldx, m, k, out);
  // Equal parts: 8 tokens are 4 and 4, not 5 and 3.
  const int parts = (m + Layout::kTokens - 1) / Layout::kTokens;
  const int step = (m + parts - 1) / parts;
  for (int i = 0; i < m; i += step) {
    dot_few<Layout, Layout::kTokens>(tile, x + i * ldx, ldx, sums + i, m - i < step ? m - i : step, k,
                                     out + i * Layout::kGroups * kLaneCount);
  }
}
