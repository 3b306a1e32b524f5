// Kernels for ARMv8.2 with dot products: Apple M1, Cortex-A76, Neoverse N1 and later. The algorithm is in neon.inl. The
// figures of CPUs are the vendors' and others', not ours.
//
//   instruction         does                                     latency: N1   M1     per cycle: N1   V1   M1
//   sdot .4s, .4b[i]    4 sums += 4 products s8 * s8             1 - 2         3      2               4    4
//   and, eor, add       bytes                                    2             2      2               4    4
//   shl, ushr           bytes                                    2             2      1               2    4
//   mul .16b            bytes                                    5             3      1/2             2    4
//   ldr q               16 bytes, ldp two of them                5             5      2               2-3  3
//
// 20 to 24 of the 32 registers hold sums, of 4 tokens with T80, 5 with R64, 3 with B128; from 12 tokens on the weights
// are unpacked, and a block of 4 tokens x 16 rows is 16 sums, 16 sdot to 4 loads of weights and 1 of activations.
//
// Bound, in operations per 16 bytes of weights: one token takes 8 (R64), 15 (B128) and 12 (T80; 17 where 3 z is two
// operations), so 2 to 4 cycles with four pipes and 4 to 9 with two: a few cores together are limited by memory. Many
// tokens are limited by sdot.
#include <arm_neon.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 16;
#include "lanes.inl"
#include "neon.inl"

struct Many {
  static constexpr int kFrom = 12;

  static ONEBIT_INLINE void order(Bytes*) {}

  template <int kLane, int kM>
  static ONEBIT_INLINE void add_unit(const std::int8_t* pairs, const Codes* x, BitsVector (*sum)[kQuads]) {
    const std::int8_t* unit = pairs + kLane / 2 * kPairBytes + kLane % 2 * kVectorBytes;
    ONEBIT_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      const Codes w = load<Codes>(unit + 2 * q * kVectorBytes);
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) sum[i][q] = dot4<kLane>(sum[i][q], w, x[i]);
    }
  }

  template <int kM>
  static ONEBIT_INLINE void dot(const std::int8_t* weights, const std::int8_t* x, std::ptrdiff_t ldx, int k,
                                BitsVector (*sum)[kQuads]) {
    ONEBIT_UNROLL
    for (int i = 0; i < kM; ++i) {
      ONEBIT_UNROLL
      for (int q = 0; q < kQuads; ++q) sum[i][q] = BitsVector{};
    }
    for (int kk = 0; kk < k; kk += kRoundInputs, weights += kRoundInputs * kLaneCount) {
      Codes codes[kM];
      ONEBIT_UNROLL
      for (int i = 0; i < kM; ++i) codes[i] = load<Codes>(x + i * ldx + kk);
      add_unit<0, kM>(weights, codes, sum);
      add_unit<1, kM>(weights, codes, sum);
      add_unit<2, kM>(weights, codes, sum);
      add_unit<3, kM>(weights, codes, sum);
    }
  }
};

}  // namespace

const Kernels kNeonDotprod = {
    .name = "neon_dotprod",
    .dot_tile = {dot_tile<T80, Many>, dot_tile<R64, Many>, dot_tile<B128, Many>, dot_tile<Q8, Many>,
                 dot_tile<Q4, Many>},
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
