// The self-test finds any kernel that is wrong, whichever it is. Kind: exact.
#include <cstring>
#include <string>

#include "check.h"
#include "onebit/kernels.h"

namespace {

using namespace onebit;

const Kernels& scalar() { return *find_kernels("scalar"); }

// The right answer with one bit of its last value flipped, as a table with one broken entry would give it.

template <int kEncoding>
void wrong_dot_tile(const std::uint8_t* tile, const std::int8_t* x, std::ptrdiff_t ldx, const std::int32_t* sums, int m,
                    int k, std::int32_t* out) noexcept {
  scalar().dot_tile[kEncoding](tile, x, ldx, sums, m, k, out);
  // Many tokens go another way through a kernel than one.
  if (m > 1) out[m * tile_rows(static_cast<Encoding>(kEncoding)) - 1] ^= 1;
}

template <Kernels::Quantize Kernels::* kKernel>
void wrong_codes(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  (scalar().*kKernel)(x, n, n_padded, codes, scale);
  codes[n - 1] ^= 1;
}

std::int32_t wrong_sum_codes(const std::int8_t* codes, int n) noexcept { return scalar().sum_codes(codes, n) + 1; }

void wrong_rms_norm(const float* x, const float* gain, float eps, int n, float* y) noexcept {
  scalar().rms_norm(x, gain, eps * 2, n, y);
  y[n - 1] *= 1.0000002f;
}

template <void (*Kernels::*kKernel)(const float*, const float*, int, float*) noexcept>
void wrong_gate(const float* gate, const float* up, int n, float* y) noexcept {
  (scalar().*kKernel)(gate, up, n, y);
  y[n - 1] = -y[n - 1] + 1.0f;
}

void wrong_add(const float* y, int n, float* x) noexcept { scalar().add(y, n - 1, x); }

template <int kFormat>
void wrong_to_cache(const float* x, int n, void* y) noexcept {
  scalar().to_cache[kFormat](x, n, y);
  static_cast<std::uint8_t*>(y)[n - 1] ^= 1;
}

void wrong_dot_bf16(const std::uint16_t* w, std::ptrdiff_t ldw, int n, const float* x, std::ptrdiff_t ldx, int m, int k,
                    float* y, std::ptrdiff_t ldy) noexcept {
  scalar().dot_bf16(w, ldw, n, x, ldx, m, k, y, ldy);
  scalar().dot_bf16(w, ldw, n, x, 0, 1, k - 1, y + (m - 1) * ldy, 0);
}

void wrong_rope(float* x, const float* cos, const float* sin, int n_heads, int d_head) noexcept {
  scalar().rope(x, cos, sin, n_heads - 1, d_head);
}

template <int kFormat>
void wrong_attend(const float* q, int heads, int d, float inv_sqrt_d, const void* const* k_blocks,
                  const void* const* v_blocks, int n_keys, float* m, float* l, float* o) noexcept {
  scalar().attend[kFormat](q, heads, d, inv_sqrt_d, k_blocks, v_blocks, n_keys - 1, m, l, o);
}

void wrong_merge_splits(int heads, int d, const float* m_b, const float* l_b, const float* o_b, float* m, float* l,
                        float* o) noexcept {
  scalar().merge_splits(heads, d - 1, m_b, l_b, o_b, m, l, o);
}

void wrong_weigh_int8(const std::int32_t* hi, const std::int32_t* lo, std::ptrdiff_t ld, const float* k_scale,
                      const float* v_scale, float q_scale, int n, Int8Weights* weights, float* m, float* l) noexcept {
  scalar().weigh_int8(hi, lo, ld, k_scale, v_scale, q_scale, n - 1, weights, m, l);
}

void wrong_mix_int8(const std::int32_t* hi, const std::int32_t*, std::ptrdiff_t ld, const Int8Weights& weights, int d,
                    float* o) noexcept {
  scalar().mix_int8(hi, hi, ld, weights, d, o);
}

// Right but for the factor of the row, or but for the second plane.
template <bool kPlanes>
void wrong_scale_sums(const std::int32_t* acc, const std::int32_t* lo, std::ptrdiff_t ld_acc, const float* w_scale,
                      bool per_row, const float* x_scale, int m, int n, bool accumulate, float* y,
                      std::ptrdiff_t ldy) noexcept {
  if (kPlanes) {
    scalar().scale_sums(acc, lo ? acc : lo, ld_acc, w_scale, per_row, x_scale, m, n, accumulate, y, ldy);
  } else {
    scalar().scale_sums(acc, lo, ld_acc, w_scale, per_row, lo ? x_scale : nullptr, m, n, accumulate, y, ldy);
  }
}

void wrong_quantize_a15(const float* x, int n, int n_padded, std::int8_t* hi, std::int8_t* lo, float* scale) noexcept {
  scalar().quantize_a15(x, n, n_padded, hi, lo, scale);
  lo[n - 1] ^= 1;
}

void wrong_dot_pair(const std::uint8_t* tiles, std::ptrdiff_t, const std::int8_t* x, std::ptrdiff_t ldx,
                    const std::int32_t* sums, int m, int k, std::int32_t* out, std::ptrdiff_t) noexcept {
  constexpr int kQ8 = static_cast<int>(Encoding::kQ8);
  for (int i = 0; i < 2; ++i) scalar().dot_tile[kQ8](tiles, x, ldx, sums, m, k, out + i * m * 16);
}

// The first kernel that is wrong, or "" if the table passes.
std::string first_wrong(const Kernels& table) {
  const char* names[64];
  const int n = self_test(scalar(), table, names, 64);
  CHECK(self_test(scalar(), table, nullptr, 0) == n);
  return n == 0 ? "" : names[0];
}

bool passes(const Kernels& table) { return first_wrong(table).empty(); }

template <typename Entry>
void check_found(Entry Kernels::* entry, Entry wrong, const char* name) {
  Kernels table = scalar();
  table.*entry = wrong;
  CHECK(first_wrong(table) == name);
}

template <int kFormat = 0>
void check_formats() {
  if constexpr (kFormat < kFloatFormats) {
    Kernels table = scalar();
    table.to_cache[kFormat] = wrong_to_cache<kFormat>;
    CHECK(first_wrong(table) == "to_cache");
    table = scalar();
    table.attend[kFormat] = wrong_attend<kFormat>;
    CHECK(first_wrong(table) == "attend");
    check_formats<kFormat + 1>();
  }
}

template <int kEncoding = 0>
void check_dot_tiles() {
  if constexpr (kEncoding < kEncodings) {
    Kernels table = scalar();
    table.dot_tile[kEncoding] = wrong_dot_tile<kEncoding>;
    CHECK(first_wrong(table) == "dot_tile");
    check_dot_tiles<kEncoding + 1>();
  }
}

}  // namespace

void test_self_test() {
  const Kernels* tables[16];
  const int n = available_kernels(tables, 16);
  CHECK(n >= 1 && std::strcmp(tables[n - 1]->name, "scalar") == 0);
  for (int i = 0; i < n; ++i) CHECK(passes(*tables[i]));
  CHECK(broken_kernels(tables, 16) == 0);

  check_dot_tiles();
  check_found(&Kernels::dot_pair, wrong_dot_pair, "dot_pair");
  check_found(&Kernels::scale_sums, wrong_scale_sums<false>, "scale_sums");
  check_found(&Kernels::scale_sums, wrong_scale_sums<true>, "scale_sums");
  check_found(&Kernels::quantize_a8, wrong_codes<&Kernels::quantize_a8>, "quantize_a8");
  check_found(&Kernels::quantize_a4, wrong_codes<&Kernels::quantize_a4>, "quantize_a4");
  check_found(&Kernels::quantize_a1, wrong_codes<&Kernels::quantize_a1>, "quantize_a1");
  check_found(&Kernels::quantize_a15, wrong_quantize_a15, "quantize_a15");
  check_found(&Kernels::sum_codes, wrong_sum_codes, "sum_codes");
  check_found(&Kernels::rms_norm, wrong_rms_norm, "rms_norm");
  check_found(&Kernels::rope, wrong_rope, "rope");
  check_found(&Kernels::silu_mul, wrong_gate<&Kernels::silu_mul>, "silu_mul");
  check_found(&Kernels::relu2_mul, wrong_gate<&Kernels::relu2_mul>, "relu2_mul");
  check_found(&Kernels::add, wrong_add, "add");
  check_found(&Kernels::dot_bf16, wrong_dot_bf16, "dot_bf16");
  check_formats();
  check_found(&Kernels::merge_splits, wrong_merge_splits, "merge_splits");
  check_found(&Kernels::weigh_int8, wrong_weigh_int8, "weigh_int8");
  check_found(&Kernels::mix_int8, wrong_mix_int8, "mix_int8");
}
