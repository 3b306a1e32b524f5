// Kernels for AMX int8, with AVX-512 VNNI and VBMI beside it: Sapphire Rapids and later.
//
//   instruction   does                                                        cycles
//   tdpbssd       C[16 tokens][16 rows] += A[16 tokens][64 k] * B[64 k][16 rows]    16, for 16384 products
//   tileloadd     16 lines of 64 bytes                                        8 from L1, 20 from L2
//   tilestored    the same                                                    16
//   vpermi2b zmm  64 bytes out of a table of 128                              2
//
// A few tokens go through vnni.inl, as they are bound by memory. For more, two row groups of some inputs are unpacked
// into scratch, as signed weights: a unit, 16 rows x 4 k, is one line of B as it stands, and 16 units fill a register.
// Activations are A where they lie, and C holds the sums themselves, without offsets.
//
//               one register of B: 16 rows x 64 k                              scratch of a row group
//   line 0      r0 k0..k3   | r1 k0..k3   | ... | r15 k0..k3     unit 0        1 KB for each 64 k, k ascending
//   line 15     r0 k60..k63 | r1 k60..k63 | ... | r15 k60..k63   unit 15
//
//   registers   2 blocks of 16 tokens x 2 groups of 16 rows: C 0 - 3, A 4 - 5, B 6 - 7; 4 loads for 4 tdpbssd
//
// Scratch stays in L1 while activations stream from L2. The first two blocks of tokens are multiplied while weights are
// being unpacked, the others follow. Bound: from about 128 tokens on tdpbssd and its loads, below that unpacking, 4 to
// 10 cycles per unit and row group.
#include <immintrin.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;
#include "lanes.inl"

#include "vnni.inl"

// ---- Tile registers ----

// The intrinsics want literal register numbers, and templates have constants.
template <int kTile>
ONEBIT_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
ONEBIT_INLINE void tile_load(const void* p, std::ptrdiff_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
ONEBIT_INLINE void tile_store(void* p, std::ptrdiff_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kC, int kA, int kB>
ONEBIT_INLINE void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

constexpr int kTileTokens = 16;
constexpr int kTileInputs = 64;
constexpr int kTileBytes = 1024;
constexpr int kPairTokens = 2 * kTileTokens;

// Registers: sums of token block t and row group g in 2 t + g, then activations of both blocks, weights of both groups.
constexpr int kFirstA = 4;
constexpr int kFirstB = 6;

// How many tokens each block has.
struct alignas(64) Shape {
  std::uint8_t palette = 1;
  std::uint8_t start = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t lines[16];

  constexpr Shape(int n_first, int n_second) : lines{} {
    const int counts[] = {n_first, n_first, n_second, n_second, n_first, n_second, 16, 16};
    for (int i = 0; i < 8; ++i) lines[i] = static_cast<std::uint8_t>(counts[i]);
  }
};
constexpr Shape kWholeBlocks(kTileTokens, kTileTokens);

// Clears all tile registers.
ONEBIT_INLINE void configure(const Shape& shape) { __asm__ volatile("ldtilecfg %0" : : "m"(shape)); }

ONEBIT_INLINE void release() { __asm__ volatile("tilerelease"); }

// ---- Weights ----

ONEBIT_INLINE __m512i bytes_of(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }

// For every byte of T80: digits 0 to 3 in two bits each, and digit 4 less 1.
struct alignas(64) DigitTables {
  std::uint8_t low[256];
  std::uint8_t last[256];

  constexpr DigitTables() : low{}, last{} {
    for (int byte = 0; byte < 256; ++byte) {
      int x = byte;
      int digits = 0;
      for (int i = 0; i < 4; ++i) {
        digits |= (3 * x / 256) << 2 * i;
        x = 3 * x % 256;
      }
      low[byte] = static_cast<std::uint8_t>(digits);
      last[byte] = static_cast<std::uint8_t>(3 * x / 256 - 1);
    }
  }
};
constexpr DigitTables kDigits;

ONEBIT_INLINE __m512i look_up(const std::uint8_t* table, __m512i x) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), x, _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), x, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
}

// The field of some bits that begins at bit kShift, less an offset.
template <int kShift>
ONEBIT_INLINE __m512i field(__m512i x, int bits, int offset) {
  const __m512i low = _mm512_and_si512(_mm512_srli_epi16(x, kShift), bytes_of((1 << bits) - 1));
  return _mm512_sub_epi8(low, bytes_of(offset));
}

// Weights of row group kGroup in a unit.
template <int kGroup>
ONEBIT_INLINE __m512i weights(T80, __m512i x) {
  if constexpr (kGroup == 4) return look_up(kDigits.last, x);
  return field<2 * kGroup>(look_up(kDigits.low, x), 2, 1);
}

template <int kGroup>
ONEBIT_INLINE __m512i weights(R64, __m512i x) {
  return field<2 * kGroup>(x, 2, 1);
}

template <int kGroup>
ONEBIT_INLINE __m512i weights(B128, __m512i x) {
  return _mm512_mask_blend_epi8(_mm512_test_epi8_mask(x, bytes_of(1 << kGroup)), bytes_of(-1), bytes_of(1));
}

template <int kGroup>
ONEBIT_INLINE __m512i weights(Q8, __m512i x) {
  return _mm512_xor_si512(x, bytes_of(128));
}

template <int kGroup>
ONEBIT_INLINE __m512i weights(Q4, __m512i x) {
  return field<4 * kGroup>(x, 4, 8);
}

// Inputs in scratch at a time: 32 rows of them stay in L1 beside the activations that stream through it.
constexpr int kChunkInputs = 512;

// One or two row groups of some inputs, unpacked: tiles of B, k ascending, zeros beyond the inputs.
struct alignas(64) Scratch {
  std::uint8_t groups[2][kChunkInputs / kTileInputs * kTileBytes];
};

template <typename Layout, int kGroup, int kG>
ONEBIT_INLINE void unpack(const std::uint8_t* units, int n_units, std::ptrdiff_t at, Scratch& scratch) {
  for (int unit = 0; unit < n_units; ++unit, units += kUnitBytes, at += kUnitBytes) {
    if constexpr (kGroup == 0) __builtin_prefetch(units + kPrefetchBytes, 0, 2);
    const __m512i x = _mm512_loadu_si512(units);
    _mm512_store_si512(scratch.groups[0] + at, weights<kGroup>(Layout{}, x));
    if constexpr (kG == 2) _mm512_store_si512(scratch.groups[1] + at, weights<kGroup + 1>(Layout{}, x));
  }
  for (int unit = n_units; unit < kTileBytes / kUnitBytes; ++unit, at += kUnitBytes) {
    for (int g = 0; g < kG; ++g) _mm512_store_si512(scratch.groups[g] + at, _mm512_setzero_si512());
  }
}

// ---- Blocks ----

// C += A * B for 64 inputs of kT blocks of tokens and kG row groups.
template <int kT, int kG>
ONEBIT_INLINE void step(const std::int8_t* x, std::ptrdiff_t ldx, const Scratch& scratch, std::ptrdiff_t at) {
  tile_load<kFirstA>(x, ldx);
  tile_load<kFirstB>(scratch.groups[0] + at, kUnitBytes);
  tile_dot<0, kFirstA, kFirstB>();
  if constexpr (kT == 2) {
    tile_load<kFirstA + 1>(x + kTileTokens * ldx, ldx);
    tile_dot<2, kFirstA + 1, kFirstB>();
  }
  if constexpr (kG == 2) {
    tile_load<kFirstB + 1>(scratch.groups[1] + at, kUnitBytes);
    tile_dot<1, kFirstA, kFirstB + 1>();
    if constexpr (kT == 2) tile_dot<3, kFirstA + 1, kFirstB + 1>();
  }
}

// What one call works on: some inputs of one or two row groups.
template <typename Layout, int kFirstGroup>
struct Panel {
  static constexpr int kG = kFirstGroup + 2 <= Layout::kGroups ? 2 : 1;
  static constexpr int kRows = Layout::kGroups * kLaneCount;
  static constexpr std::ptrdiff_t kLdOut = kRows * 4;

  const std::uint8_t* units;
  std::ptrdiff_t ldx;
  int k;
  bool accumulate;  // add to out
  Scratch scratch;

  // Unpacks the inputs [kk, kk + 64), zeros beyond k.
  ONEBIT_INLINE void unpack_tile(int kk) {
    const int n_units = (k - kk < kTileInputs ? k - kk : kTileInputs) / 4;
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(kk) / 4 * kUnitBytes;
    unpack<Layout, kFirstGroup, kG>(units + at, n_units, at, scratch);
  }

  // out (+)= x * w, for n_tokens tokens in kT blocks. The first call for a panel unpacks, one tile ahead: then the two
  // overlap, and the tile unit, which falls asleep after a microsecond and wakes slowly, stays awake.
  template <int kT, bool kUnpack>
  void multiply(const std::int8_t* x, int n_tokens, std::int32_t* out) {
    char* y[2] = {reinterpret_cast<char*>(out + kFirstGroup * kLaneCount),
                  reinterpret_cast<char*>(out + kFirstGroup * kLaneCount) + kTileTokens * kLdOut};
    if constexpr (kUnpack) unpack_tile(0);
    if (accumulate) {
      tile_load<0>(y[0], kLdOut);
      if constexpr (kG == 2) tile_load<1>(y[0] + kUnitBytes, kLdOut);
      if constexpr (kT == 2) tile_load<2>(y[1], kLdOut);
      if constexpr (kT == 2 && kG == 2) tile_load<3>(y[1] + kUnitBytes, kLdOut);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int kk = 0; kk < k; kk += kTileInputs) {
      if constexpr (kUnpack) {
        if (kk + kTileInputs < k) unpack_tile(kk + kTileInputs);
      }
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(kk) / 4 * kUnitBytes;
      if (kk + kTileInputs <= k) {
        step<kT, kG>(x + kk, ldx, scratch, at);
      } else {
        // Beyond the inputs lies memory of others, perhaps none at all.
        alignas(64) std::int8_t end[kT * kTileTokens * kTileInputs];
        const __mmask64 inputs = (__mmask64{1} << (k - kk)) - 1;
        for (int i = 0; i < n_tokens; ++i) {
          _mm512_store_si512(end + i * kTileInputs, _mm512_maskz_loadu_epi8(inputs, x + i * ldx + kk));
        }
        step<kT, kG>(end, kTileInputs, scratch, at);
      }
    }
    tile_store<0>(y[0], kLdOut);
    if constexpr (kG == 2) tile_store<1>(y[0] + kUnitBytes, kLdOut);
    if constexpr (kT == 2) tile_store<2>(y[1], kLdOut);
    if constexpr (kT == 2 && kG == 2) tile_store<3>(y[1] + kUnitBytes, kLdOut);
  }
};

// Row groups from kGroup on, two at a time, of all tokens. rest: the shape of the last, incomplete pair of blocks.
template <typename Layout, int kGroup = 0>
void dot_groups(const std::uint8_t* units, const std::int8_t* x, std::ptrdiff_t ldx, int m, int k, bool accumulate,
                const Shape& rest, std::int32_t* out) noexcept {
  using Groups = Panel<Layout, kGroup>;
  Groups panel;
  panel.units = units;
  panel.ldx = ldx;
  panel.k = k;
  panel.accumulate = accumulate;
  int i = 0;
  if (m >= kPairTokens) {
    configure(kWholeBlocks);
    panel.template multiply<2, true>(x, kPairTokens, out);
    for (i = kPairTokens; i + kPairTokens <= m; i += kPairTokens) {
      panel.template multiply<2, false>(x + i * ldx, kPairTokens, out + i * Groups::kRows);
    }
    if (i < m) configure(rest);
    if (i + kTileTokens < m) {
      panel.template multiply<2, false>(x + i * ldx, m - i, out + i * Groups::kRows);
    } else if (i < m) {
      panel.template multiply<1, false>(x + i * ldx, m - i, out + i * Groups::kRows);
    }
  } else if (m > kTileTokens) {
    panel.template multiply<2, true>(x, m, out);
  } else {
    panel.template multiply<1, true>(x, m, out);
  }
  if constexpr (kGroup + Groups::kG < Layout::kGroups) {
    dot_groups<Layout, kGroup + Groups::kG>(units, x, ldx, m, k, accumulate, rest, out);
  }
}

// From this many tokens on: fewer do not pay for unpacking.
constexpr int kMinTokens = 9;

template <typename Layout>
void dot_tile_amx(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m,
                  int k, std::int32_t* out) noexcept {
  if (m < kMinTokens) return dot_tile<Layout>(tile, x, ldx, sums, m, k, out);
  const int n_rest = m % kPairTokens;
  const Shape rest(n_rest < kTileTokens ? n_rest : kTileTokens, n_rest > kTileTokens ? n_rest - kTileTokens : 16);
  if (m < kPairTokens) configure(rest);
  for (int kk = 0; kk < k; kk += kChunkInputs) {
    const int count = k - kk < kChunkInputs ? k - kk : kChunkInputs;
    const std::uint8_t* units = tile + static_cast<std::ptrdiff_t>(kk) / 4 * kUnitBytes;
    dot_groups<Layout>(units, x + kk, ldx, m, count, kk > 0, rest, out);
  }
  release();
}

}  // namespace

const Kernels kAmx = {
    .name = "amx",
    .dot_tile = {dot_tile_amx<T80>, dot_tile_amx<R64>, dot_tile_amx<B128>, dot_tile_amx<Q8>, dot_tile_amx<Q4>},
    .dot_pair = dot_pair<8>,
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
