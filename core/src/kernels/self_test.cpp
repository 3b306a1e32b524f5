// One small case of every kernel, to be answered alike by every table: a compiler's or a CPU's mistake shows here, before
// it reaches a model.
//
// The case is odd on purpose: widths that fill no register, more tokens than a block, inputs beyond a whole tile of AMX.
#include <cstring>

#include "onebit/kernels.h"

namespace onebit {
namespace {

constexpr int kInputs = 80;
constexpr int kTokens = 17;
constexpr int kManyTokens = 38;
// Two tiles of Q8 in one, not quite next to each other.
constexpr int kPairInputs = 32;
constexpr int kPairBytes = 12 * 64;
constexpr int kValues = 37;
constexpr int kPadded = 48;
constexpr int kWidth = 24;
constexpr int kHeads = 3;
constexpr int kKeys = kBlockTokens + 6;

// Numbers without a pattern, the same everywhere.
class Random {
 public:
  std::uint32_t next() {
    state_ = state_ * 1664525 + 1013904223;
    return state_ >> 8;
  }
  int between(int low, int high) { return low + static_cast<int>(next() % static_cast<unsigned>(high - low + 1)); }
  float value() { return static_cast<float>(between(-4000, 4000)) / 1024.0f; }

 private:
  std::uint32_t state_ = 1;
};

struct Case {
  alignas(64) std::uint8_t tile[kInputs / 4 * 64];
  alignas(64) std::int8_t x[kTokens * kInputs];
  std::int32_t sums[kTokens];
  std::int32_t pair_sums[kTokens];  // of the first kPairInputs
  float a[kValues];
  float b[kValues];
  float angles[2][kWidth / 2];
  float q[kHeads * kWidth];
  float scales[kBlockTokens + 1];
  // bfloat16; their bytes are numbers of fp8.
  std::uint16_t keys[2][kBlockTokens * kWidth];
  std::uint16_t values[2][kBlockTokens * kWidth];

  Case() {
    Random random;
    for (auto& byte : tile) byte = static_cast<std::uint8_t>(random.next());
    for (auto& code : x) code = static_cast<std::int8_t>(random.between(-127, 127));
    for (int i = 0; i < kTokens; ++i) {
      sums[i] = 0;
      for (int k = 0; k < kInputs; ++k) {
        if (k == kPairInputs) pair_sums[i] = sums[i];
        sums[i] += x[i * kInputs + k];
      }
    }
    for (auto& value : a) value = random.value();
    for (auto& value : b) value = random.value();
    for (auto& row : angles) {
      for (auto& value : row) value = random.value();
    }
    for (auto& value : q) value = random.value();
    for (auto& value : scales) value = 4.5f + random.value();
    for (auto& block : keys) {
      for (auto& value : block) value = static_cast<std::uint16_t>(0x3f00 + random.between(0, 255));
    }
    for (auto& block : values) {
      for (auto& value : block) value = static_cast<std::uint16_t>(0xbf00 + random.between(0, 255));
    }
  }
};

// What a table answers, all its bytes set.
struct Answers {
  std::int32_t one[kEncodings][kMaxTileRows];
  std::int32_t many[kEncodings][kTokens * kMaxTileRows];
  std::int32_t pair[2][kTokens * 16];
  float scaled[2][2 * kValues];
  float scaled15[2 * kValues];
  std::int8_t codes[3][kPadded];
  std::int8_t codes15[2][kPadded];
  float scales[4];
  std::int32_t code_sum;
  float normed[kValues];
  float rotated[kHeads * kWidth];
  float gated[2][kValues];
  float added[kValues];
  float dots[kTokens * kTokens];
  float many_dots[kManyTokens * kTokens];
  std::uint16_t halves[kValues];
  std::uint8_t bytes[kValues];
  float m[kFloatFormats][kHeads];
  float l[kFloatFormats][kHeads];
  float attended[kFloatFormats][kHeads * kWidth];
  float merged_ml[2][kHeads];
  float merged[kHeads * kWidth];
  std::int8_t weights[2][kBlockTokens];
  std::int32_t weight_sums[2];
  float factors[5];
  float mixed[kWidth];

  Answers(const Kernels& table, const Case& given) noexcept {
    std::memset(static_cast<void*>(this), 0, sizeof *this);
    const Case& g = given;
    for (int e = 0; e < kEncodings; ++e) {
      table.dot_tile[e](g.tile, g.x, kInputs, g.sums, 1, kInputs, one[e]);
      table.dot_tile[e](g.tile, g.x, kInputs, g.sums, kTokens, kInputs, many[e]);
    }
    const auto dot_q8 = table.dot_tile[static_cast<int>(Encoding::kQ8)];
    if (table.dot_pair) {
      table.dot_pair(g.tile, kPairBytes, g.x, kInputs, g.pair_sums, kTokens, kPairInputs, pair[0], kTokens * 16);
    } else {
      dot_q8(g.tile, g.x, kInputs, g.pair_sums, kTokens, kPairInputs, pair[0]);
      dot_q8(g.tile + kPairBytes, g.x, kInputs, g.pair_sums, kTokens, kPairInputs, pair[1]);
    }
    const std::int32_t* sums = many[0];
    const std::int32_t* lo = sums + 2 * kMaxTileRows;
    table.scale_sums(sums, nullptr, kMaxTileRows, g.a, true, nullptr, 2, kValues, false, scaled[0], kValues);
    table.scale_sums(sums, nullptr, kMaxTileRows, g.b, false, g.a, 2, kValues, true, scaled[0], kValues);
    table.scale_sums(sums, nullptr, kMaxTileRows, g.b, true, g.a, 2, kValues, false, scaled[1], kValues);
    table.scale_sums(sums, lo, kMaxTileRows, g.a, true, nullptr, 2, kValues, false, scaled15, kValues);
    table.scale_sums(lo, sums, kMaxTileRows, g.b, false, g.a, 2, kValues, true, scaled15, kValues);
    table.quantize_a8(g.a, kValues, kPadded, codes[0], &scales[0]);
    table.quantize_a4(g.a, kValues, kPadded, codes[1], &scales[1]);
    table.quantize_a1(g.a, kValues, kPadded, codes[2], &scales[2]);
    table.quantize_a15(g.a, kValues, kPadded, codes15[0], codes15[1], &scales[3]);
    code_sum = table.sum_codes(g.x, kInputs);
    table.rms_norm(g.a, g.b, 1e-5f, kValues, normed);
    std::memcpy(rotated, g.q, sizeof rotated);
    table.rope(rotated, g.angles[0], g.angles[1], kHeads, kWidth);
    table.silu_mul(g.a, g.b, kValues, gated[0]);
    table.relu2_mul(g.a, g.b, kValues, gated[1]);
    std::memcpy(added, g.a, sizeof added);
    table.add(g.b, kValues, added);
    // Tokens that overlap, and many that are one and the same.
    table.dot_bf16(g.keys[0], kValues + 3, kTokens, g.a, 1, kTokens, kValues - kTokens, dots, kTokens);
    table.dot_bf16(g.keys[0], kValues + 3, kTokens, g.a, 0, kManyTokens, kValues, many_dots, kTokens);
    table.to_cache[0](g.a, kValues, halves);
    table.to_cache[1](g.a, kValues, bytes);
    const void* const keys[] = {g.keys[0], g.keys[1], g.keys[0]};
    const void* const values[] = {g.values[0], g.values[1], g.values[0]};
    for (int f = 0; f < kFloatFormats; ++f) {
      // Bytes of bfloat16 are large numbers of fp8.
      table.attend[f](g.q, kHeads, kWidth, f == 0 ? 0.25f : 0.0002f, keys, values, kKeys, m[f], l[f], attended[f]);
    }
    std::memcpy(merged, attended[0], sizeof merged);
    std::memcpy(merged_ml[0], m[0], sizeof m[0]);
    std::memcpy(merged_ml[1], l[0], sizeof l[0]);
    table.merge_splits(kHeads, kWidth, m[1], l[1], attended[1], merged_ml[0], merged_ml[1], merged);

    Int8Weights block = {weights[0], weights[1], 0, 0, 0.0f, 0.0f, 0.0f};
    factors[3] = 1.0f;
    table.weigh_int8(sums, sums + kBlockTokens, 16, g.scales, g.scales + 1, 1e-5f, kBlockTokens - 3, &block,
                     &factors[3], &factors[4]);
    weight_sums[0] = block.hi_sum;
    weight_sums[1] = block.lo_sum;
    factors[0] = block.scale;
    factors[1] = block.keep;
    factors[2] = block.take;
    table.mix_int8(sums, sums + kBlockTokens, 16, block, kWidth, mixed);
  }
};

template <typename T>
bool differ(const T& a, const T& b) noexcept {
  return std::memcmp(&a, &b, sizeof a) != 0;
}

}  // namespace

int self_test(const Kernels& reference, const Kernels& table, const char** names, int capacity) noexcept {
  const Case given;
  const Answers e(reference, given);
  const Answers a(table, given);
  int n = 0;
  const auto note = [&](const char* name, bool is_wrong) {
    if (is_wrong && n < capacity) names[n] = name;
    n += is_wrong;
  };
  note("dot_tile", differ(a.one, e.one) || differ(a.many, e.many));
  note("dot_pair", differ(a.pair, e.pair));
  note("scale_sums", differ(a.scaled, e.scaled) || differ(a.scaled15, e.scaled15));
  note("quantize_a8", differ(a.codes[0], e.codes[0]) || differ(a.scales[0], e.scales[0]));
  note("quantize_a4", differ(a.codes[1], e.codes[1]) || differ(a.scales[1], e.scales[1]));
  note("quantize_a1", differ(a.codes[2], e.codes[2]) || differ(a.scales[2], e.scales[2]));
  note("quantize_a15", differ(a.codes15, e.codes15) || differ(a.scales[3], e.scales[3]));
  note("sum_codes", differ(a.code_sum, e.code_sum));
  note("rms_norm", differ(a.normed, e.normed));
  note("rope", differ(a.rotated, e.rotated));
  note("silu_mul", differ(a.gated[0], e.gated[0]));
  note("relu2_mul", differ(a.gated[1], e.gated[1]));
  note("add", differ(a.added, e.added));
  note("dot_bf16", differ(a.dots, e.dots) || differ(a.many_dots, e.many_dots));
  note("to_cache", differ(a.halves, e.halves) || differ(a.bytes, e.bytes));
  note("attend", differ(a.m, e.m) || differ(a.l, e.l) || differ(a.attended, e.attended));
  note("merge_splits", differ(a.merged_ml, e.merged_ml) || differ(a.merged, e.merged));
  note("weigh_int8",
       differ(a.weights, e.weights) || differ(a.weight_sums, e.weight_sums) || differ(a.factors, e.factors));
  note("mix_int8", differ(a.mixed, e.mixed));
  if (n == 0) note("unknown", differ(a, e));
  return n;
}

}  // namespace onebit
