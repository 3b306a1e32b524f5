// onebit._core.kernels: each kernel of each instruction set, for the tests.
//
// Thin: an argument per argument, outputs written in place. All sizes are checked here, because Python may pass
// anything and kernels check nothing.
#include "onebit/kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace {

using namespace onebit;

template <typename T, int kDims>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// Far above any test, far below where an int index could overflow.
constexpr std::size_t kMaxValues = std::size_t{1} << 28;

void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa.c_str());
  require(kernels != nullptr, "isa '" + isa + "': not available here; see available_isas()");
  return *kernels;
}

Encoding encoding_of(const std::string& name) {
  for (int i = 0; i < kEncodings; ++i) {
    if (name == kEncodingNames[i]) return static_cast<Encoding>(i);
  }
  throw nb::value_error(("encoding '" + name + "': expected t80, r64, b128, q8 or q4").c_str());
}

int length(std::size_t n) {
  require(n >= 1 && n <= kMaxValues, std::to_string(n) + " values: expected 1 to 2^28");
  return static_cast<int>(n);
}

void require_length(const char* name, std::size_t actual, std::size_t expected) {
  require(actual == expected,
          std::string(name) + " has " + std::to_string(actual) + " values; expected " + std::to_string(expected));
}

void dot_tile(const std::string& isa, const std::string& encoding, Array<const std::uint8_t, 2> tile,
              Array<const std::int8_t, 2> x, Array<const std::int32_t, 1> sums, Array<std::int32_t, 2> out) {
  const Encoding layout = encoding_of(encoding);
  const std::size_t k = tile.shape(0) * 4;
  require(tile.shape(1) == 64, "tile: expected units of 64 bytes");
  require(k >= 16 && k % kInputAlign == 0 && k <= kMaxDotInputs,
          "tile holds " + std::to_string(k) + " inputs; expected a multiple of 16 from 16 to 32768");
  require(x.shape(1) >= k, "x rows are shorter than the tile's inputs");
  const int m = length(x.shape(0));
  length(x.size());
  require_length("sums", sums.size(), x.shape(0));
  require(out.shape(0) == x.shape(0) && out.shape(1) == static_cast<std::size_t>(tile_rows(layout)),
          "out: expected [tokens, tile rows]");
  kernels_of(isa).dot_tile[static_cast<int>(layout)](tile.data(), x.data(), static_cast<std::ptrdiff_t>(x.shape(1)),
                                                     sums.data(), m, static_cast<int>(k), out.data());
}

// Of two tiles of Q8 that share one array; returns whether the table has this kernel.
bool dot_pair(const std::string& isa, Array<const std::uint8_t, 3> tiles, Array<const std::int8_t, 2> x,
              Array<const std::int32_t, 1> sums, int k, Array<std::int32_t, 3> out) {
  require(tiles.shape(0) == 2 && tiles.shape(2) == 64, "tiles: expected two of units of 64 bytes");
  require(k >= 16 && k % kInputAlign == 0 && static_cast<std::size_t>(k) <= tiles.shape(1) * 4 && k <= kMaxDotInputs &&
              x.shape(1) >= static_cast<std::size_t>(k),
          "k: expected a multiple of 16, at most the inputs of a tile and of x");
  const int m = length(x.shape(0));
  length(x.size());
  require_length("sums", sums.size(), x.shape(0));
  require(out.shape(0) == 2 && out.shape(1) == x.shape(0) && out.shape(2) == 16, "out: expected [2, tokens, 16]");
  const auto kernel = kernels_of(isa).dot_pair;
  if (kernel) {
    kernel(tiles.data(), static_cast<std::ptrdiff_t>(tiles.shape(1) * 64), x.data(),
           static_cast<std::ptrdiff_t>(x.shape(1)), sums.data(), m, k, out.data(), static_cast<std::ptrdiff_t>(m) * 16);
  }
  return kernel != nullptr;
}

void scale_sums(const std::string& isa, Array<const std::int32_t, 2> acc,
                std::optional<Array<const std::int32_t, 2>> lo, Array<const float, 1> w_scale, bool per_row,
                std::optional<Array<const float, 1>> x_scale, bool accumulate, Array<float, 2> y) {
  const int m = length(acc.shape(0));
  const int n = length(y.shape(1));
  require_length("y", y.shape(0), acc.shape(0));
  require(acc.shape(1) >= y.shape(1), "acc rows are shorter than those of y");
  require(!lo || (lo->shape(0) == acc.shape(0) && lo->shape(1) == acc.shape(1)), "lo: expected the shape of acc");
  require(!x_scale || x_scale->size() == acc.shape(0), "x_scale: expected one value for each row of acc");
  require_length("w_scale", w_scale.size(), per_row ? y.shape(1) : 1);
  kernels_of(isa).scale_sums(acc.data(), lo ? lo->data() : nullptr, static_cast<std::ptrdiff_t>(acc.shape(1)),
                             w_scale.data(), per_row, x_scale ? x_scale->data() : nullptr, m, n, accumulate, y.data(),
                             n);
}

template <Kernels::Quantize Kernels::* kKernel>
float quantize(const std::string& isa, Array<const float, 1> x, Array<std::int8_t, 1> codes) {
  require(codes.size() >= x.size(), "codes: expected room for every value of x");
  float scale;
  (kernels_of(isa).*kKernel)(x.data(), length(x.size()), length(codes.size()), codes.data(), &scale);
  return scale;
}

float quantize_a15(const std::string& isa, Array<const float, 1> x, Array<std::int8_t, 1> hi,
                   Array<std::int8_t, 1> lo) {
  require(hi.size() >= x.size(), "hi: expected room for every value of x");
  require_length("lo", lo.size(), hi.size());
  float scale;
  kernels_of(isa).quantize_a15(x.data(), length(x.size()), length(hi.size()), hi.data(), lo.data(), &scale);
  return scale;
}

std::int32_t sum_codes(const std::string& isa, Array<const std::int8_t, 1> codes) {
  require(codes.size() % kInputAlign == 0 && codes.size() < (1 << 24), "codes: expected a multiple of 16 values");
  return kernels_of(isa).sum_codes(codes.data(), length(codes.size()));
}

void rms_norm(const std::string& isa, Array<const float, 1> x, Array<const float, 1> gain, float eps,
              Array<float, 1> y) {
  require_length("gain", gain.size(), x.size());
  require_length("y", y.size(), x.size());
  kernels_of(isa).rms_norm(x.data(), gain.data(), eps, length(x.size()), y.data());
}

void rope(const std::string& isa, Array<float, 2> x, Array<const float, 1> cos, Array<const float, 1> sin) {
  length(x.size());
  require(x.shape(1) % 2 == 0, "x: expected an even head width");
  require_length("cos", cos.size(), x.shape(1) / 2);
  require_length("sin", sin.size(), x.shape(1) / 2);
  kernels_of(isa).rope(x.data(), cos.data(), sin.data(), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)));
}

using Gate = void (*)(const float*, const float*, int, float*) noexcept;

template <Gate Kernels::* kKernel>
void gate_mul(const std::string& isa, Array<const float, 1> gate, Array<const float, 1> up, Array<float, 1> y) {
  require_length("up", up.size(), gate.size());
  require_length("y", y.size(), gate.size());
  (kernels_of(isa).*kKernel)(gate.data(), up.data(), length(gate.size()), y.data());
}

void add(const std::string& isa, Array<const float, 1> y, Array<float, 1> x) {
  require_length("x", x.size(), y.size());
  kernels_of(isa).add(y.data(), length(y.size()), x.data());
}

// Which of the float formats, "bf16" or "fp8". Blocks and outputs are its numbers, uint16 or uint8.
int float_format(const std::string& name) {
  for (int i = 0; i < kFloatFormats; ++i) {
    if (name == kKvFormatNames[i]) return i;
  }
  throw nb::value_error(("format '" + name + "': expected bf16 or fp8").c_str());
}

template <int kDims>
using Numbers = nb::ndarray<nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

void require_numbers(const char* name, int format, nb::dlpack::dtype dtype) {
  const bool is_bf16 = format == static_cast<int>(KvFormat::kBf16);
  require(dtype == (is_bf16 ? nb::dtype<std::uint16_t>() : nb::dtype<std::uint8_t>()),
          std::string(name) + ": expected uint16 for bf16, uint8 for fp8");
}

void to_cache(const std::string& isa, const std::string& format, Array<const float, 1> x, Numbers<1> y) {
  const int kind = float_format(format);
  require_numbers("y", kind, y.dtype());
  require_length("y", y.size(), x.size());
  kernels_of(isa).to_cache[kind](x.data(), length(x.size()), y.data());
}

void dot_bf16(const std::string& isa, Array<const std::uint16_t, 2> w, Array<const float, 2> x, Array<float, 2> y) {
  length(w.size());
  length(x.size());
  require_length("x", x.shape(1), w.shape(1));
  require_length("y", y.shape(0), x.shape(0));
  require_length("y", y.shape(1), w.shape(0));
  const auto k = static_cast<std::ptrdiff_t>(w.shape(1));
  const auto n = static_cast<std::ptrdiff_t>(w.shape(0));
  kernels_of(isa).dot_bf16(w.data(), k, static_cast<int>(n), x.data(), k, static_cast<int>(x.shape(0)),
                           static_cast<int>(k), y.data(), n);
}

void attend(const std::string& isa, const std::string& format, Array<const float, 2> q, float inv_sqrt_d,
            const std::vector<Numbers<2>>& k_blocks, const std::vector<Numbers<2>>& v_blocks, int n_keys,
            Array<float, 1> m, Array<float, 1> l, Array<float, 2> o) {
  const int kind = float_format(format);
  length(q.size());
  const std::size_t d = q.shape(1);
  require(o.shape(0) == q.shape(0) && o.shape(1) == d, "o: expected the shape of q");
  require_length("m", m.size(), q.shape(0));
  require_length("l", l.size(), q.shape(0));
  const std::size_t n_blocks = k_blocks.size();
  require(n_keys >= 1 && n_blocks <= kSplitBlocks && n_blocks == v_blocks.size() &&
              static_cast<std::size_t>(n_keys) <= n_blocks * kBlockTokens,
          "n_keys: expected 1 to 64 per block, at most 8 blocks, and as many of values as of keys");
  std::vector<const void*> k, v;
  for (std::size_t b = 0; b < n_blocks; ++b) {
    require_numbers("k block", kind, k_blocks[b].dtype());
    require_numbers("v block", kind, v_blocks[b].dtype());
    require(k_blocks[b].shape(0) == kBlockTokens && k_blocks[b].shape(1) == d, "k block: expected [64, d]");
    require(v_blocks[b].shape(0) == kBlockTokens && v_blocks[b].shape(1) == d, "v block: expected [64, d]");
    k.push_back(k_blocks[b].data());
    v.push_back(v_blocks[b].data());
  }
  // The block that would come next.
  k.push_back(k.front());
  v.push_back(v.front());
  kernels_of(isa).attend[kind](q.data(), static_cast<int>(q.shape(0)), static_cast<int>(d), inv_sqrt_d, k.data(),
                               v.data(), n_keys, m.data(), l.data(), o.data());
}

void merge_splits(const std::string& isa, Array<const float, 1> m_b, Array<const float, 1> l_b,
                  Array<const float, 2> o_b, Array<float, 1> m, Array<float, 1> l, Array<float, 2> o) {
  length(o.size());
  require(o_b.shape(0) == o.shape(0) && o_b.shape(1) == o.shape(1), "o_b: expected the shape of o");
  for (const std::size_t n : {m_b.size(), l_b.size(), m.size(), l.size()}) require_length("m or l", n, o.shape(0));
  kernels_of(isa).merge_splits(static_cast<int>(o.shape(0)), static_cast<int>(o.shape(1)), m_b.data(), l_b.data(),
                               o_b.data(), m.data(), l.data(), o.data());
}

// Returns both sums, scale, keep, take, m and l.
nb::tuple weigh_int8(const std::string& isa, Array<const std::int32_t, 2> hi, Array<const std::int32_t, 2> lo,
                     Array<const float, 1> k_scale, Array<const float, 1> v_scale, float q_scale, int n,
                     Array<std::int8_t, 1> w_hi, Array<std::int8_t, 1> w_lo, float m, float l) {
  require(hi.shape(1) == 16 && lo.shape(1) == 16 && hi.shape(0) == lo.shape(0), "hi and lo: expected [tiles, 16]");
  require(n >= 1 && n <= kBlockTokens && static_cast<std::size_t>(n) <= hi.size(), "n: expected 1 to 64, a key each");
  require_length("k_scale", k_scale.size(), kBlockTokens);
  require_length("v_scale", v_scale.size(), kBlockTokens);
  require_length("w_hi", w_hi.size(), kBlockTokens);
  require_length("w_lo", w_lo.size(), kBlockTokens);
  Int8Weights weights{w_hi.data(), w_lo.data(), 0, 0, 0.0f, 0.0f, 0.0f};
  kernels_of(isa).weigh_int8(hi.data(), lo.data(), 16, k_scale.data(), v_scale.data(), q_scale, n, &weights, &m, &l);
  return nb::make_tuple(weights.hi_sum, weights.lo_sum, weights.scale, weights.keep, weights.take, m, l);
}

void mix_int8(const std::string& isa, Array<const std::int32_t, 2> hi, Array<const std::int32_t, 2> lo, float scale,
              float keep, float take, Array<float, 1> o) {
  require(hi.shape(1) == 16 && lo.shape(1) == 16 && hi.shape(0) == lo.shape(0), "hi and lo: expected [tiles, 16]");
  require(o.size() <= hi.size(), "o: expected a product for each value");
  const Int8Weights weights{nullptr, nullptr, 0, 0, scale, keep, take};
  kernels_of(isa).mix_int8(hi.data(), lo.data(), 16, weights, length(o.size()), o.data());
}

}  // namespace

void bind_kernels(nb::module_& m) {
  using namespace nb::literals;
  m.doc() = "The kernels of each instruction set, one function per entry; outputs are written in place.";
  m.def("dot_tile", &dot_tile, "isa"_a, "encoding"_a, "tile"_a, "x"_a, "sums"_a, "out"_a);
  m.def("dot_pair", &dot_pair, "isa"_a, "tiles"_a, "x"_a, "sums"_a, "k"_a, "out"_a);
  m.def("scale_sums", &scale_sums, "isa"_a, "acc"_a, "lo"_a.none(), "w_scale"_a, "per_row"_a, "x_scale"_a.none(),
        "accumulate"_a, "y"_a);
  m.def("quantize_a8", &quantize<&Kernels::quantize_a8>, "isa"_a, "x"_a, "codes"_a);
  m.def("quantize_a4", &quantize<&Kernels::quantize_a4>, "isa"_a, "x"_a, "codes"_a);
  m.def("quantize_a1", &quantize<&Kernels::quantize_a1>, "isa"_a, "x"_a, "codes"_a);
  m.def("quantize_a15", &quantize_a15, "isa"_a, "x"_a, "hi"_a, "lo"_a);
  m.def("sum_codes", &sum_codes, "isa"_a, "codes"_a);
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "gain"_a, "eps"_a, "y"_a);
  m.def("rope", &rope, "isa"_a, "x"_a, "cos"_a, "sin"_a);
  m.def("silu_mul", &gate_mul<&Kernels::silu_mul>, "isa"_a, "gate"_a, "up"_a, "y"_a);
  m.def("relu2_mul", &gate_mul<&Kernels::relu2_mul>, "isa"_a, "gate"_a, "up"_a, "y"_a);
  m.def("add", &add, "isa"_a, "y"_a, "x"_a);
  m.def("to_cache", &to_cache, "isa"_a, "format"_a, "x"_a, "y"_a);
  m.def("dot_bf16", &dot_bf16, "isa"_a, "w"_a, "x"_a, "y"_a);
  m.def("attend", &attend, "isa"_a, "format"_a, "q"_a, "inv_sqrt_d"_a, "k_blocks"_a, "v_blocks"_a, "n_keys"_a, "m"_a,
        "l"_a, "o"_a);
  m.def("merge_splits", &merge_splits, "isa"_a, "m_b"_a, "l_b"_a, "o_b"_a, "m"_a, "l"_a, "o"_a);
  m.def("weigh_int8", &weigh_int8, "isa"_a, "hi"_a, "lo"_a, "k_scale"_a, "v_scale"_a, "q_scale"_a, "n"_a, "w_hi"_a,
        "w_lo"_a, "m"_a, "l"_a);
  m.def("mix_int8", &mix_int8, "isa"_a, "hi"_a, "lo"_a, "scale"_a, "keep"_a, "take"_a, "o"_a);
}
