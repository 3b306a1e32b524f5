// Every kernel of every table gives the bits of the scalar one. Kind: exact.
//
// Inputs are any bytes and any numbers, also those that packing and models never produce. Outputs lie before a guard
// that nobody may write, and what a kernel must not read is garbage.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "onebit/kernels.h"
#include "random.h"

namespace {

using namespace onebit;

constexpr int kGuard = 8;
constexpr int kSizes[] = {1, 2, 15, 16, 17, 31, 37, 48, 100, 257};

const Kernels& scalar() { return *find_kernels("scalar"); }

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found(16);
  found.resize(static_cast<std::size_t>(available_kernels(found.data(), 16)));
  return found;
}

// Equal bits, but any NaN for a NaN: which of two operands it is made from differs.
template <typename T>
bool is_same(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    if (a != a && b != b) return true;
  }
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename T>
void check_same(const Kernels& table, const char* what, int a, int b, const std::vector<T>& actual,
                const std::vector<T>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (is_same(actual[i], expected[i])) continue;
    ++n_failed_checks;
    std::fprintf(stderr, "%s: %s (%d, %d): value %zu of %zu is %.9g, not %.9g\n", table.name, what, a, b, i,
                 expected.size() - kGuard, static_cast<double>(actual[i]), static_cast<double>(expected[i]));
    return;
  }
}

// run(table, y) fills y, n values of T, and may look at what is in it; a and b tell the case.
template <typename T, typename Run>
void compare(const char* what, int a, int b, const std::vector<T>& start, Run run) {
  const auto answer = [&](const Kernels& table) {
    std::vector<T> y = start;
    y.resize(start.size() + kGuard, T{77});
    run(table, y.data());
    return y;
  };
  const std::vector<T> expected = answer(scalar());
  for (const Kernels* table : tables()) check_same(*table, what, a, b, answer(*table), expected);
}

template <typename T, typename Run>
void compare(const char* what, int a, int b, int n, Run run) {
  compare(what, a, b, std::vector<T>(static_cast<std::size_t>(n)), run);
}

// ---- Exact sums ----

struct Tokens {
  int m, k;
  std::ptrdiff_t ldx;
  std::vector<std::int8_t> x;
  std::vector<std::int32_t> sums;

  // value(token, input); between the rows stands garbage.
  template <typename Value>
  Tokens(int m_, int k_, Value value) : m(m_), k(k_), ldx(k_ + 16), x(m_ * ldx, -128), sums(m_) {
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < k; ++j) sums[i] += x[i * ldx + j] = static_cast<std::int8_t>(value(i, j));
    }
  }

  std::vector<std::int32_t> dot(const Kernels& table, int encoding, const std::vector<std::uint8_t>& tile,
                                int count) const {
    const int rows = tile_rows(static_cast<Encoding>(encoding));
    std::vector<std::int32_t> out(static_cast<std::size_t>(count * rows + kGuard), -1);
    table.dot_tile[encoding](tile.data(), x.data(), ldx, sums.data(), count, k, out.data());
    return out;
  }
};

void test_sums_of_any_bytes() {
  constexpr int kMaxTokens = 100;
  Random random;
  for (const int k : {16, 32, 48, 80, 208, 1040, 4096}) {
    const Tokens tokens(kMaxTokens, k, [&](int, int) { return random.between(-127, 127); });
    std::vector<std::uint8_t> tile(static_cast<std::size_t>(k) * 16);
    for (auto& byte : tile) byte = static_cast<std::uint8_t>(random.next());
    for (int e = 0; e < kEncodings; ++e) {
      const int rows = tile_rows(static_cast<Encoding>(e));
      const std::vector<std::int32_t> all = tokens.dot(scalar(), e, tile, kMaxTokens);
      for (int m = 1; m <= kMaxTokens; m += m < 17 ? 1 : m == 17 ? 14 : m == 31 ? 17 : m == 48 ? 16 : 36) {
        // A token's sums do not depend on the others.
        std::vector<std::int32_t> expected(all.begin(), all.begin() + m * rows);
        expected.resize(expected.size() + kGuard, -1);
        for (const Kernels* table : tables()) {
          // The slow reference has answered already.
          if (table == &scalar()) continue;
          check_same(*table, kEncodingNames[e], m, k, tokens.dot(*table, e, tile, m), expected);
        }
      }
    }
  }
}

// All weights and all activations of one sign at their largest: a product is the weight times the sum of activations.
void test_the_largest_sums() {
  constexpr int kMaxTokens = 13;
  Random random;
  const Tokens ones(1, 16, [](int, int) { return 1; });
  const Tokens tokens(kMaxTokens, kMaxDotInputs, [&](int i, int) {
    return i % 3 == 0 ? 127 : i % 3 == 1 ? -127 : random.next() % 2 ? 127 : -127;
  });
  for (const int byte : {0, 86, 170, 255}) {
    const std::vector<std::uint8_t> tile(static_cast<std::size_t>(kMaxDotInputs) * 16, static_cast<std::uint8_t>(byte));
    for (int e = 0; e < kEncodings; ++e) {
      const std::vector<std::int32_t> weights = ones.dot(scalar(), e, tile, 1);
      const int rows = tile_rows(static_cast<Encoding>(e));
      for (const int m : {1, 5, kMaxTokens}) {
        std::vector<std::int32_t> expected;
        for (int i = 0; i < m; ++i) {
          for (int row = 0; row < rows; ++row) expected.push_back(weights[row] / 16 * tokens.sums[i]);
        }
        expected.resize(expected.size() + kGuard, -1);
        for (const Kernels* table : tables()) {
          check_same(*table, kEncodingNames[e], m, byte, tokens.dot(*table, e, tile, m), expected);
        }
      }
    }
  }
}

void test_sum_codes() {
  for (const int n : {16, 48, 4096, kMaxDotInputs}) {
    const Tokens tokens(1, n, [](int, int j) { return j % 64 == 5 ? 1 : -127; });
    for (const Kernels* table : tables()) CHECK(table->sum_codes(tokens.x.data(), n) == tokens.sums[0]);
  }
}

void test_scales() {
  Random random;
  constexpr int kLd = 130;
  std::vector<std::int32_t> acc(6 * kLd);
  for (auto& sum : acc) sum = static_cast<std::int32_t>(random.next());
  acc[0] = std::numeric_limits<std::int32_t>::min();
  acc[kLd] = std::numeric_limits<std::int32_t>::max();
  const std::int32_t* lo = acc.data() + 3 * static_cast<std::ptrdiff_t>(kLd);
  const std::vector<float> w_scale = random.values(kLd);
  const float x_scale[] = {0.37f, 1e-7f, 3.0f};
  for (const int n : {1, 15, 16, 33, 128}) {
    for (int options = 0; options < 16; ++options) {
      compare("scale_sums", n, options, random.values(3 * n), [&](const Kernels& table, float* y) {
        table.scale_sums(acc.data(), options & 4 ? lo : nullptr, kLd, w_scale.data(), options & 8,
                         options & 1 ? x_scale : nullptr, 3, n, options & 2, y, n);
      });
    }
  }
}

// ---- Float work ----

void compare_cache(const char* what, int a, int b, int n, const float* x) {
  compare<std::uint16_t>(what, a, b, n, [&](const Kernels& table, std::uint16_t* y) { table.to_cache[0](x, n, y); });
  compare<std::uint8_t>(what, a, b, n, [&](const Kernels& table, std::uint8_t* y) { table.to_cache[1](x, n, y); });
}

// Rows that are hard to round or to compare.
std::vector<std::vector<float>> rows_of(int n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
  const float mixed[] = {0.0f,           -0.0f, 0.5f,      -0.5f,  1.5f,   2.5f,  1e-45f, -1e-40f,
                         1.1754944e-38f, 1e-5f, 87.5f,     88.5f,  -87.5f, 88.0f, -87.0f, 104.0f,
                         -104.0f,        1e30f, -kLargest, -88.5f, 3.0f,   -1e-6f};
  Random random;
  std::vector<std::vector<float>> rows(11);
  rows[0] = random.values(n);
  for (int i = 0; i < n; ++i) {
    const float half = static_cast<float>(i % 127) + 0.5f;
    rows[1].push_back(i == n - 1 ? 127.0f : i % 2 ? half : -half);                                        // ties of a8
    rows[2].push_back(i == n - 1 ? 16256.0f : static_cast<float>(random.between(-16000, 16000)) + 0.5f);  // of a15
    rows[3].push_back(i % 2 ? 1.5f * 0x1p-3f : -0x1p-4f);                                                 // and of a4
    rows[4].push_back(0.0f);
    rows[5].push_back(static_cast<float>(i) * kSmallest);
    rows[6].push_back(mixed[i % 22]);
    rows[7].push_back(i == n / 2 ? kNan : random.value());
    rows[8].push_back(i == n / 3 ? -kInfinity : random.value());
    rows[9].push_back(i % 2 ? kLargest : -kLargest);
    rows[10].push_back(static_cast<float>(random.between(-110, 110)) + random.value());  // all of exp
  }
  return rows;
}

void test_quantisers() {
  for (const int n : kSizes) {
    const int padded = pad_inputs(n);
    int number = 0;
    for (const std::vector<float>& x : rows_of(n)) {
      const auto quantise = [&](const char* what, Kernels::Quantize Kernels::* kernel) {
        float scale;
        compare<std::int8_t>(what, n, number, padded, [&](const Kernels& table, std::int8_t* codes) {
          (table.*kernel)(x.data(), n, padded, codes, &scale);
        });
        compare<float>(what, n, number, 1, [&](const Kernels& table, float* y) {
          std::vector<std::int8_t> codes(static_cast<std::size_t>(padded));
          (table.*kernel)(x.data(), n, padded, codes.data(), y);
        });
      };
      quantise("quantize_a8", &Kernels::quantize_a8);
      quantise("quantize_a4", &Kernels::quantize_a4);
      quantise("quantize_a1", &Kernels::quantize_a1);
      compare<std::int8_t>("quantize_a15", n, number, 2 * padded, [&](const Kernels& table, std::int8_t* codes) {
        float scale;
        table.quantize_a15(x.data(), n, padded, codes, codes + padded, &scale);
      });
      ++number;
    }
  }
}

void test_elementwise() {
  for (const int n : kSizes) {
    const std::vector<std::vector<float>> rows = rows_of(n);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const int number = static_cast<int>(i);
      const float* x = rows[i].data();
      // Beside ordinary values, and beside the next hard row.
      for (const float* other : {rows[0].data(), rows[(i + 1) % rows.size()].data()}) {
        const auto map = [&](const char* what, auto run) { compare<float>(what, n, number, n, run); };
        map("rms_norm", [&](const Kernels& table, float* y) { table.rms_norm(x, other, 1e-5f, n, y); });
        map("silu_mul", [&](const Kernels& table, float* y) { table.silu_mul(x, other, n, y); });
        map("relu2_mul", [&](const Kernels& table, float* y) { table.relu2_mul(x, other, n, y); });
        compare("add", n, number, rows[i], [&](const Kernels& table, float* y) { table.add(other, n, y); });
      }
      compare_cache("to_cache", n, number, n, x);
    }
  }
}

// Every sign, exponent and rounding, and every kind of NaN.
void test_to_cache() {
  std::vector<float> x;
  for (std::uint32_t upper = 0; upper < 0x10000; upper += 37) {
    for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      x.push_back(std::bit_cast<float>(upper << 16 | lower));
    }
  }
  const int n = static_cast<int>(x.size());
  compare_cache("to_cache", n, 0, n, x.data());
}

void test_rope_kernel() {
  Random random;
  for (const int width : {2, 24, 32, 64, 128}) {
    for (const int heads : {1, 3, 5}) {
      const std::vector<float> cos = random.values(width / 2);
      const std::vector<float> sin = random.values(width / 2);
      compare("rope", width, heads, random.values(heads * width),
              [&](const Kernels& table, float* x) { table.rope(x, cos.data(), sin.data(), heads, width); });
    }
  }
}

void test_dot_bf16() {
  Random random;
  // The last is longer than the parts that kernels may take.
  for (const int k : {1, 15, 16, 17, 37, 48, 257, 1050}) {
    const int ldw = k + 3;
    const int ldx = k + 1;
    for (const int n : {1, 3, 4, 5, 9, 16, 38}) {
      const std::vector<std::uint16_t> w = random.halves(n * ldw);
      for (const int m : {1, 4, 7, 38, 69}) {
        const std::vector<float> x = random.values(m * ldx);
        const int ldy = n + 2;
        compare<float>("dot_bf16", k, n, m * ldy, [&](const Kernels& table, float* y) {
          table.dot_bf16(w.data(), ldw, n, x.data(), ldx, m, k, y, ldy);
        });
      }
    }
  }
}

// ---- Attention ----

// m, l and o of each head, one after the other.
struct State {
  float* m;
  float* l;
  float* o;
  State(float* y, int heads) : m(y), l(y + heads), o(y + 2 * heads) {}
};

void test_attention() {
  constexpr int kBlocks = 4;
  Random random;
  for (const int d : {2, 24, 32, 64, 128}) {
    for (const int n_keys : {1, 15, 63, 64, 65, 200}) {
      for (int format = 0; format < kFloatFormats; ++format) {
        const int bytes = format == 0 ? 2 : 1;
        std::vector<std::uint8_t> cache[2];
        const void* blocks[2][kBlocks + 1];
        for (int side = 0; side < 2; ++side) {
          const std::vector<float> numbers = random.values(kBlocks * kBlockTokens * d);
          // What no number is, where no key is.
          cache[side].assign(numbers.size() * bytes, 0x7f);
          scalar().to_cache[format](numbers.data(), n_keys * d, cache[side].data());
          for (int b = 0; b < kBlocks; ++b) blocks[side][b] = cache[side].data() + b * kBlockTokens * d * bytes;
          blocks[side][kBlocks] = blocks[side][0];
        }
        for (int heads = 1; heads <= 5; ++heads) {
          const std::vector<float> q = random.values(heads * d);
          const float inv_sqrt_d = 1.0f / std::sqrt(static_cast<float>(d));
          compare<float>(
              kKvFormatNames[format], d, 1000 * heads + n_keys, heads * (2 + d), [&](const Kernels& table, float* y) {
                const State to(y, heads);
                table.attend[format](q.data(), heads, d, inv_sqrt_d, blocks[0], blocks[1], n_keys, to.m, to.l, to.o);
              });
        }
      }
    }
    for (int heads = 1; heads <= 3; ++heads) {
      std::vector<float> part = random.values(heads * (2 + d));
      compare("merge_splits", d, heads, random.values(heads * (2 + d)), [&](const Kernels& table, float* y) {
        const State from(part.data(), heads), to(y, heads);
        table.merge_splits(heads, d, from.m, from.l, from.o, to.m, to.l, to.o);
      });
    }
  }
}

void test_int8_attention() {
  Random random;
  std::vector<std::int32_t> products(2 * 128);
  for (auto& product : products) product = random.between(-100000, 100000);
  const std::int32_t* hi = products.data();
  const std::int32_t* lo = hi + 16;
  std::vector<float> scales[2] = {random.values(kBlockTokens), random.values(kBlockTokens)};
  for (auto& side : scales) {
    for (auto& scale : side) scale = std::fabs(scale) + 0.01f;
  }
  for (const int n : {1, 15, 16, 17, 40, 64}) {
    for (const float q_scale : {1e-7f, 1e-5f, 1e-2f}) {
      Int8Weights weights{};
      const auto weigh = [&](const Kernels& table, std::int8_t* codes, float* m, float* l) {
        weights = {codes, codes + kBlockTokens, 0, 0, 0.0f, 0.0f, 0.0f};
        table.weigh_int8(hi, lo, 32, scales[0].data(), scales[1].data(), q_scale, n, &weights, m, l);
      };
      compare<std::int8_t>("weigh_int8, codes", n, 0, 2 * kBlockTokens, [&](const Kernels& table, std::int8_t* codes) {
        float m = -1.0f, l = 2.0f;
        weigh(table, codes, &m, &l);
      });
      compare<float>("weigh_int8", n, 0, 7, [&](const Kernels& table, float* y) {
        std::int8_t codes[2 * kBlockTokens];
        y[0] = -1.0f;
        y[1] = 2.0f;
        weigh(table, codes, y, y + 1);
        const float rest[] = {weights.scale, weights.keep, weights.take, static_cast<float>(weights.hi_sum),
                              static_cast<float>(weights.lo_sum)};
        std::copy_n(rest, 5, y + 2);
      });
    }
  }
  const Int8Weights weights{nullptr, nullptr, 0, 0, 0.01f, 0.25f, 0.75f};
  for (const int d : {2, 24, 32, 64, 128}) {
    compare("mix_int8", d, 0, random.values(d),
            [&](const Kernels& table, float* o) { table.mix_int8(hi, lo, 32, weights, d, o); });
  }
}

void test_pairs() {
  Random random;
  std::vector<std::uint8_t> tiles(2 * 20 * 64);
  for (auto& byte : tiles) byte = static_cast<std::uint8_t>(random.next());
  for (const int k : {16, 48, 64}) {
    for (const int m : {1, 3, 8, 9, 20}) {
      const Tokens tokens(m, k, [&](int, int) { return random.between(-127, 127); });
      compare<std::int32_t>("dot_pair", m, k, 2 * m * 16, [&](const Kernels& table, std::int32_t* out) {
        const std::int8_t* x = tokens.x.data();
        if (table.dot_pair) {
          return table.dot_pair(tiles.data(), 20 * 64, x, tokens.ldx, tokens.sums.data(), m, k, out, m * 16);
        }
        const auto dot = table.dot_tile[static_cast<int>(Encoding::kQ8)];
        for (int i = 0; i < 2; ++i) {
          dot(tiles.data() + i * 20 * 64, x, tokens.ldx, tokens.sums.data(), m, k, out + i * m * 16);
        }
      });
    }
  }
}

}  // namespace

void test_kernels() {
  test_sums_of_any_bytes();
  test_the_largest_sums();
  test_sum_codes();
  test_scales();
  test_quantisers();
  test_elementwise();
  test_to_cache();
  test_rope_kernel();
  test_dot_bf16();
  test_attention();
  test_int8_attention();
  test_pairs();
}
