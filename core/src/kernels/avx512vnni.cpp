// Kernels for AVX-512 with VNNI (F, BW, VL, DQ): Ice Lake, Zen 4 and later.
//
//   instruction             does                                    latency   per cycle: Ice Lake   Zen 5
//   vpdpbusd zmm            16 sums += 4 products u8 * s8           4 - 5     1                     2
//   vpandd, vpaddb zmm      bytes                                   1         2                     4
//   vpbroadcastd zmm, m32   the same 4 activations in all lanes     -         2                     2
//
// A unit is 64 bytes = one register: lane r holds rows 16 * j + r at 4 consecutive inputs, one row group j per digit of
// the byte. One broadcast of 4 activations serves all lanes, and lane r of an accumulator is a row: no horizontal sum.
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
// t * activation fits in 32 bits, which holds to 33000 inputs. Bound: one token reads 0.2 bytes per weight (T80) and is
// limited by memory; from 4 tokens on vpdpbusd is the limit.
#include <immintrin.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 64;
#include "lanes.inl"

constexpr int kUnitBytes = 64;
// Far enough ahead of one token's stream to hide the latency of memory.
constexpr int kPrefetchBytes = 8192;

// GCC copies the accumulator around the intrinsic; the instruction itself costs nothing extra.
ONEBIT_INLINE __m512i dot4(__m512i sum, __m512i w, __m512i x) {
#if defined(__clang__)
  return _mm512_dpbusd_epi32(sum, w, x);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
#endif
}

ONEBIT_INLINE __m512i below(__m512i x, int bits) {
  return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)));
}

// The digit that b has on top of a: (b - a) >> bits.
ONEBIT_INLINE __m512i difference(__m512i b, __m512i a, int bits) {
  return (__m512i)((IntVector)_mm512_sub_epi32(b, a) >> bits);
}

// One struct per layout. kOffset: what a row's sum holds too much of S. kTokens: as many as keep all plane sums in
// registers. kUnroll: units at once for one token, so that enough independent sums hide the latency of vpdpbusd.
struct T80 {
  static constexpr int kGroups = 5;
  static constexpr int kPlanes = 6;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 4;
  static constexpr int kUnroll = 2;

  static ONEBIT_INLINE void split(__m512i x, __m512i* plane) {
    plane[0] = x;
    for (int i = 1; i < kPlanes; ++i) {
      plane[i] = _mm512_add_epi8(_mm512_add_epi8(plane[i - 1], plane[i - 1]), plane[i - 1]);
    }
  }

  static ONEBIT_INLINE __m512i row(const __m512i* d, int j, __m512i s) {
    const __m512i triple = _mm512_add_epi32(_mm512_add_epi32(d[j], d[j]), d[j]);
    return _mm512_sub_epi32(difference(triple, d[j + 1], 8), s);
  }
};

struct R64 {
  static constexpr int kGroups = 4;
  static constexpr int kPlanes = 4;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 6;
  static constexpr int kUnroll = 2;

  static ONEBIT_INLINE void split(__m512i x, __m512i* plane) {
    for (int j = 0; j < 3; ++j) plane[j] = below(x, 2 * j + 2);
    plane[3] = x;
  }

  static ONEBIT_INLINE __m512i row(const __m512i* d, int j, __m512i s) {
    return _mm512_sub_epi32(j == 0 ? d[0] : difference(d[j], d[j - 1], 2 * j), s);
  }
};

struct B128 {
  static constexpr int kGroups = 8;
  static constexpr int kPlanes = 8;
  static constexpr int kOffset = 1;
  static constexpr int kTokens = 2;
  static constexpr int kUnroll = 2;

  static ONEBIT_INLINE void split(__m512i x, __m512i* plane) {
    for (int j = 0; j < 7; ++j) plane[j] = below(x, j + 1);
    plane[7] = x;
  }

  static ONEBIT_INLINE __m512i row(const __m512i* d, int j, __m512i s) {
    const __m512i ones = j == 0 ? d[0] : difference(d[j], d[j - 1], j);
    return _mm512_sub_epi32(_mm512_add_epi32(ones, ones), s);
  }
};

struct Q8 {
  static constexpr int kGroups = 1;
  static constexpr int kPlanes = 1;
  static constexpr int kOffset = 128;
  static constexpr int kTokens = 6;
  static constexpr int kUnroll = 4;

  static ONEBIT_INLINE void split(__m512i x, __m512i* plane) { plane[0] = x; }

  static ONEBIT_INLINE __m512i row(const __m512i* d, int, __m512i s) { return _mm512_sub_epi32(d[0], s); }
};

struct Q4 {
  static constexpr int kGroups = 2;
  static constexpr int kPlanes = 2;
  static constexpr int kOffset = 8;
  static constexpr int kTokens = 6;
  static constexpr int kUnroll = 4;

  static ONEBIT_INLINE void split(__m512i x, __m512i* plane) {
    plane[0] = below(x, 4);
    plane[1] = x;
  }

  static ONEBIT_INLINE __m512i row(const __m512i* d, int j, __m512i s) {
    return _mm512_sub_epi32(j == 0 ? d[0] : difference(d[1], d[0], 4), s);
  }
};

// One tile for exactly kM tokens. k is a multiple of 16, so 4 units divide it.
template <typename Layout, int kM>
void dot_tokens(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int k,
                std::int32_t* out) noexcept {
  constexpr int kUnroll = kM == 1 ? Layout::kUnroll : 1;
  __m512i sum[kUnroll][kM][Layout::kPlanes];
#pragma GCC unroll 32
  for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 32
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 32
      for (int p = 0; p < Layout::kPlanes; ++p) sum[u][i][p] = _mm512_setzero_si512();
    }
  }

  for (int kk = 0; kk < k; kk += 4 * kUnroll) {
#pragma GCC unroll 32
    for (int u = 0; u < kUnroll; ++u, tile += kUnitBytes) {
      if constexpr (kM == 1) __builtin_prefetch(tile + kPrefetchBytes);
      __m512i plane[Layout::kPlanes];
      Layout::split(_mm512_loadu_si512(tile), plane);
#pragma GCC unroll 32
      for (int i = 0; i < kM; ++i) {
        std::int32_t four;
        __builtin_memcpy(&four, x + i * ldx + kk + 4 * u, sizeof four);
        const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 32
        for (int p = 0; p < Layout::kPlanes; ++p) sum[u][i][p] = dot4(sum[u][i][p], plane[p], activations);
      }
    }
  }

#pragma GCC unroll 32
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 32
    for (int u = 1; u < kUnroll; ++u) {
#pragma GCC unroll 32
      for (int p = 0; p < Layout::kPlanes; ++p) sum[0][i][p] = _mm512_add_epi32(sum[0][i][p], sum[u][i][p]);
    }
    const __m512i s = _mm512_set1_epi32(sums[i] * Layout::kOffset);
#pragma GCC unroll 32
    for (int j = 0; j < Layout::kGroups; ++j, out += kLaneCount) {
      _mm512_storeu_si512(out, Layout::row(sum[0][i], j, s));
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

}  // namespace

const Kernels kAvx512Vnni = {
    .name = "avx512vnni",
    .dot_tile = {dot_tile<T80>, dot_tile<R64>, dot_tile<B128>, dot_tile<Q8>, dot_tile<Q4>},
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
