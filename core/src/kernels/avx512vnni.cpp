// Kernels for AVX-512 with VNNI (F, BW, VL, DQ): Ice Lake, Zen 4 and later. The algorithm is in vnni.inl.
//
//   instruction             does                                    latency   per cycle: Ice Lake   Zen 5
//   vpdpbusd zmm            16 sums += 4 products u8 * s8           4 - 5     1                     2
//   vpandd, vpaddb zmm      bytes                                   1         2                     4
//   vpbroadcastd zmm, m32   the same 4 activations in all lanes     -         2                     2
//
// A unit is one register, and 24 of the 32 registers hold sums: 6 tokens x 4 planes of R64, 4 x 6 of T80, 3 x 8 of B128.
//
// Bound: one token reads 0.2 bytes per weight (T80) and is limited by memory; from 4 tokens on vpdpbusd is the limit.
#include <immintrin.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;
#include "lanes.inl"
#include "vnni.inl"

}  // namespace

const Kernels kAvx512Vnni = {
    .name = "avx512vnni",
    .dot_tile = {dot_tile_t80, dot_tile<R64>, dot_tile<B128>, dot_tile<Q8>, dot_tile<Q4>},
    .dot_pair = dot_pair<8>,
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
