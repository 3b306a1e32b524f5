// Kernels for AVX2: Haswell, Zen 1 and later. No fused multiply-add, which would change the bits.
//
//   instruction          does                                      latency   per cycle: Haswell   Zen 5
//   vpmaddubsw ymm       16 sums of 2 products u8 * s8, in int16   5 - 3     1                    2
//   vpmaddwd ymm         8 sums of 2 products int16, in int32      5 - 3     1                    2
//   vpaddw, vpand ymm    words, bits                               1         2 - 3                4
//   vpcmpgtb ymm         bytes                                     1         2                    2 - 4
//
// A unit is 64 bytes, two registers ("halves"): lane r holds rows 16 * j + r at 4 consecutive inputs.
//
//   half 0   r0 k0..k3 | r1 k0..k3 | ... | r7        half 1   r8 k0..k3 | ... | r15 k0..k3
//
// Bytes are split into planes of at most 15, because vpmaddubsw saturates and int16 must hold a run of units; every run
// is then widened into int32 sums. Rows are differences of plane sums, as a dot product is linear.
//
//   layout   planes of a byte x            rows from plane sums D, S = sum of activations   operations per unit
//   T80      the digits t_0 .. t_4         D_j - S                                          76 for 320 weights
//   R64      x & 3, x & 15, same of x >> 4 D_0 - S, ((D_1 - D_0) >> 2) - S, ...             26 for 256
//   B128     x & 1, 3, 7, 15, of x >> 4    2 ((D_j - D_{j-1}) >> j % 4) - S                 52 for 512
//   Q4       x & 15, x >> 4                D_j - 8 S                                        14 for 128
//   Q8       int16(x)                      sum of int16 products - 128 S                    12 for 64
//
// T80 needs its digits one by one here: 3 x_i - x_{i+1} works on whole bytes, whose products overflow int16. A machine
// with nothing better reads R64, which a model in T80 is turned into (prefers_r64).
#include <immintrin.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 32;
#include "lanes.inl"

constexpr int kUnitBytes = 64;
// Far enough ahead of one token's stream to hide the latency of memory.
constexpr int kPrefetchBytes = 8192;

ONEBIT_INLINE __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

ONEBIT_INLINE void store(std::int32_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// One struct per layout. kOffset: what a row's sum holds too much of S. kTokens: as many as keep all plane sums in
// registers. kRun: units whose products fit in int16, whatever the bytes: 2 * 127 * (largest plane value) * kRun <=
// 32767.
struct T80 {
  static constexpr int kGroups = 5;
  static constexpr int kPlanes = 5;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 2;
  static constexpr int kRun = 64;

  static ONEBIT_INLINE void split(__m256i x, __m256i* plane) {
    // With the top bit flipped, bytes compare as signed, and multiply by 3 as before: 3 * 128 = 128 mod 256.
    __m256i y = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
    for (int i = 0; i < kPlanes; ++i) {
      // The digit is 3 x / 256: at least 1 from x = 86 on, 2 from 171 on.
      const __m256i one = _mm256_cmpgt_epi8(y, _mm256_set1_epi8(85 - 128));
      const __m256i two = _mm256_cmpgt_epi8(y, _mm256_set1_epi8(170 - 128));
      plane[i] = _mm256_abs_epi8(_mm256_add_epi8(one, two));
      y = _mm256_add_epi8(_mm256_add_epi8(y, y), y);
    }
  }

  static ONEBIT_INLINE __m256i row(const __m256i* d, int j, __m256i s) { return _mm256_sub_epi32(d[j], s); }
};

ONEBIT_INLINE __m256i below(__m256i x, int bits) {
  return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>((1 << bits) - 1)));
}

struct R64 {
  static constexpr int kGroups = 4;
  static constexpr int kPlanes = 4;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 2;
  static constexpr int kRun = 8;

  static ONEBIT_INLINE void split(__m256i x, __m256i* plane) {
    const __m256i high = _mm256_srli_epi16(x, 4);
    plane[0] = below(x, 2);
    plane[1] = below(x, 4);
    plane[2] = below(high, 2);
    plane[3] = below(high, 4);
  }

  static ONEBIT_INLINE __m256i row(const __m256i* d, int j, __m256i s) {
    const __m256i t = j % 2 == 0 ? d[j] : _mm256_srai_epi32(_mm256_sub_epi32(d[j], d[j - 1]), 2);
    return _mm256_sub_epi32(t, s);
  }
};

struct B128 {
  static constexpr int kGroups = 8;
  static constexpr int kPlanes = 8;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 1;
  static constexpr int kRun = 8;

  static ONEBIT_INLINE void split(__m256i x, __m256i* plane) {
    const __m256i high = _mm256_srli_epi16(x, 4);
    for (int j = 0; j < 4; ++j) {
      plane[j] = below(x, j + 1);
      plane[j + 4] = below(high, j + 1);
    }
  }

  static ONEBIT_INLINE __m256i row(const __m256i* d, int j, __m256i s) {
    const __m256i ones = j % 4 == 0 ? d[j] : _mm256_srai_epi32(_mm256_sub_epi32(d[j], d[j - 1]), j % 4);
    return _mm256_sub_epi32(_mm256_add_epi32(ones, ones), s);
  }
};

struct Q4 {
  static constexpr int kGroups = 2;
  static constexpr int kPlanes = 2;
  static constexpr int kOffset = 8;
  static constexpr int kTokens = 4;
  static constexpr int kRun = 8;

  static ONEBIT_INLINE void split(__m256i x, __m256i* plane) {
    plane[0] = below(x, 4);
    plane[1] = below(_mm256_srli_epi16(x, 4), 4);
  }

  static ONEBIT_INLINE __m256i row(const __m256i* d, int j, __m256i s) { return _mm256_sub_epi32(d[j], s); }
};

// One tile for exactly kM tokens.
template <typename Layout, int kM>
void dot_tokens(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int k,
                std::int32_t* out) noexcept {
  __m256i sum[2][kM][Layout::kPlanes] = {};
  for (int start = 0; start < k; start += 4 * Layout::kRun) {
    const int end = k - start < 4 * Layout::kRun ? k : start + 4 * Layout::kRun;
    for (int half = 0; half < 2; ++half) {
      __m256i run[kM][Layout::kPlanes];
#pragma GCC unroll 32
      for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 32
        for (int p = 0; p < Layout::kPlanes; ++p) run[i][p] = _mm256_setzero_si256();
      }
      for (int kk = start; kk < end; kk += 4) {
        const std::uint8_t* unit = tile + static_cast<std::ptrdiff_t>(kk / 4) * kUnitBytes;
        if constexpr (kM <= 2) __builtin_prefetch(unit + kPrefetchBytes);
        __m256i plane[Layout::kPlanes];
        Layout::split(load(unit + 32 * half), plane);
#pragma GCC unroll 32
        for (int i = 0; i < kM; ++i) {
          std::int32_t four;
          __builtin_memcpy(&four, x + i * ldx + kk, sizeof four);
          const __m256i activations = _mm256_set1_epi32(four);
#pragma GCC unroll 32
          for (int p = 0; p < Layout::kPlanes; ++p) {
            run[i][p] = _mm256_add_epi16(run[i][p], _mm256_maddubs_epi16(plane[p], activations));
          }
        }
      }
#pragma GCC unroll 32
      for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 32
        for (int p = 0; p < Layout::kPlanes; ++p) {
          const __m256i wide = _mm256_madd_epi16(run[i][p], _mm256_set1_epi16(1));
          sum[half][i][p] = _mm256_add_epi32(sum[half][i][p], wide);
        }
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    const __m256i s = _mm256_set1_epi32(sums[i] * Layout::kOffset);
    for (int j = 0; j < Layout::kGroups; ++j, out += kLaneCount) {
      store(out, Layout::row(sum[0][i], j, s));
      store(out + 8, Layout::row(sum[1][i], j, s));
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
  for (int i = 0; i < m; i += Layout::kTokens) {
    const int count = m - i < Layout::kTokens ? m - i : Layout::kTokens;
    dot_few<Layout, Layout::kTokens>(tile, x + i * ldx, ldx, sums + i, count, k,
                                     out + i * Layout::kGroups * kLaneCount);
  }
}

// Q8: bytes up to 255 would saturate vpmaddubsw, so both sides are widened to int16. Each int32 then holds half of a
// row's four products, and neighbours are added at the end.
void dot_tile_q8(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m,
                 int k, std::int32_t* out) noexcept {
  for (int i = 0; i < m; ++i, x += ldx, out += kLaneCount) {
    __m256i sum[4] = {};
    const std::uint8_t* unit = tile;
    for (int kk = 0; kk < k; kk += 4, unit += kUnitBytes) {
      __builtin_prefetch(unit + kPrefetchBytes);
      std::int32_t four;
      __builtin_memcpy(&four, x + kk, sizeof four);
      const __m256i activations = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
#pragma GCC unroll 32
      for (int q = 0; q < 4; ++q) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * q));
        sum[q] = _mm256_add_epi32(sum[q], _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), activations));
      }
    }
    const __m256i s = _mm256_set1_epi32(sums[i] * 128);
    for (int half = 0; half < 2; ++half) {
      // hadd works within 128 bits, so its result holds rows 0 1 4 5 2 3 6 7 in pairs.
      const __m256i mixed = _mm256_hadd_epi32(sum[2 * half], sum[2 * half + 1]);
      store(out + 8 * half, _mm256_sub_epi32(_mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0)), s));
    }
  }
}

}  // namespace

const Kernels kAvx2 = {
    .name = "avx2",
    .prefers_r64 = true,
    .dot_tile = {dot_tile<T80>, dot_tile<R64>, dot_tile<B128>, dot_tile_q8, dot_tile<Q4>},
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
