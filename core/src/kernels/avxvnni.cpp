// Kernels for AVX-VNNI, vpdpbusd in 256 bits without AVX-512: Alder Lake, Sierra Forest, Zen 5 and later. The algorithm
// is in vnni.inl.
//
//   instruction             does                                    latency   per cycle: Alder Lake (P / E)   Zen 5
//   vpdpbusd ymm            8 sums += 4 products u8 * s8            5         2 / 1                           2
//   vpand, vpaddb ymm       bytes                                   1         3 / 3                           4
//   vpbroadcastd ymm, m32   the same 4 activations in all lanes     -         2 - 3 / 2                       2
//
// A unit is two registers, and 12 of the 16 registers hold sums: for one token both halves x 6 planes of T80 or x 4 of
// R64; for more, one half after the other, 3 tokens x 4 planes of R64, 2 x 6 of T80, 1 x 8 of B128.
//
//   half 0   r0 k0..k3 | r1 k0..k3 | ... | r7        half 1   r8 k0..k3 | ... | r15 k0..k3
//
// Bound: half of AVX-512's sums per instruction, still above what memory delivers for one token.
#include <immintrin.h>

#include "tables.h"

namespace onebit {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;
#include "lanes.inl"
#include "vnni.inl"

}  // namespace

const Kernels kAvxVnni = {
    .name = "avxvnni",
    .dot_tile = {dot_tile_t80, dot_tile<R64>, dot_tile<B128>, dot_tile<Q8>, dot_tile<Q4>},
    ONEBIT_LANE_KERNELS,
};

}  // namespace onebit
