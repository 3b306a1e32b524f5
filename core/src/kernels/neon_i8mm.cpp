// Kernels for ARMv8 with int8 matrix products: Apple M2, Neoverse V1 and N2, Cortex-A710 and later. The algorithm is in
// neon.inl. The figures of CPUs are the vendors', not ours.
//
//   instruction         does                                               latency   per cycle: Neoverse N2   V1
//   smmla .4s           2 rows x 2 tokens += 8 products s8 * s8 each       3         2                        4
//   sdot .4s, .4b[i]    4 rows += 4 products each                          3         2                        4
//   zip1, zip2          halves of two registers in turn                    2         2                        4
//
// Few tokens are those of sdot. From 6 on, weights are unpacked so that a register holds 8 inputs of 2 rows, and two
// tokens share a register of 8 inputs each:
//
//   packed     unit 2 u: r0 k0..k3 | r1 | r2 | r3     unit 2 u + 1: r0 k4..k7 | r1 | r2 | r3
//   unpacked   r0 k0..k7 | r1 k0..k7                  r2 k0..k7 | r3 k0..k7
//   tokens     t0 k0..k7 | t1 k0..k7
//   sums       r0 t0 | r0 t1 | r1 t0 | r1 t1          a square; an odd last token is multiplied twice
//
// A block is 4 tokens x 16 rows: 16 squares, for 8 inputs 16 smmla beside 2 zips and 10 loads.
//
// Bound: one token as with sdot; many tokens smmla, twice the products of sdot.
#include <arm_neon.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 16;
#include "lanes.inl"
#include "neon.inl"

struct Many {
  static constexpr int kFrom = 6;

  // Two rows of 8 inputs each from four rows of 4: rows 0 and 1, then rows 2 and 3.
  static ONEBIT_INLINE void order(Bytes* quad) {
    const auto a = (uint32x4_t)quad[0];
    const auto b = (uint32x4_t)quad[1];
    quad[0] = (Bytes)vzip1q_u32(a, b);
    quad[1] = (Bytes)vzip2q_u32(a, b);
  }

  // Adds 8 inputs; x: those of two tokens in each register.
  template <int kPairs>
  static ONEBIT_INLINE void add_pair(const std::int8_t* pair, const int8x16_t* x, int32x4_t (*sum)[2 * kQuads]) {
    ONEBIT_UNROLL
    for (int h = 0; h < 2 * kQuads; ++h) {
      const auto w = (int8x16_t)load<Codes>(pair + h * kVectorBytes);
      ONEBIT_UNROLL
      for (int i = 0; i < kPairs; ++i) sum[i][h] = vmmlaq_s32(sum[i][h], w, x[i]);
    }
  }

  template <int kM>
  static ONEBIT_INLINE void dot(const std::int8_t* weights, const std::int8_t* x, std::ptrdiff_t ldx, int k,
                                BitsVector (*sum)[kQuads]) {
    // A last token without a partner is its own.
    constexpr int kPairs = (kM + 1) / 2;
    int32x4_t square[kPairs][2 * kQuads];
    ONEBIT_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      ONEBIT_UNROLL
      for (int h = 0; h < 2 * kQuads; ++h) square[i][h] = vdupq_n_s32(0);
    }
    for (int kk = 0; kk < k; kk += kRoundInputs, weights += 2 * kPairBytes) {
      int8x16_t low[kPairs];
      int8x16_t high[kPairs];
      ONEBIT_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const auto a = load<int64x2_t>(x + 2 * i * ldx + kk);
        const auto b = load<int64x2_t>(x + (2 * i + 1 < kM ? 2 * i + 1 : 2 * i) * ldx + kk);
        low[i] = (int8x16_t)vzip1q_s64(a, b);
        high[i] = (int8x16_t)vzip2q_s64(a, b);
      }
      add_pair<kPairs>(weights, low, square);
      add_pair<kPairs>(weights + kPairBytes, high, square);
    }
    // A square is (row, token) (row, token + 1) (row + 1, token) (row + 1, token + 1).
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        const int32x4_t a = square[i / 2][2 * q];
        const int32x4_t b = square[i / 2][2 * q + 1];
        sum[i][q] = (BitsVector)(i % 2 == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b));
      }
    }
  }
};

}  // namespace

const Kernels kNeonI8mm = {
    .name = "neon_i8mm",
    .dot_tile = {dot_tile<T80, Many>, dot_tile<R64, Many>, dot_tile<B128, Many>, dot_tile<Q8, Many>,
                 dot_tile<Q4, Many>},
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
