#include "onebit/linear.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace onebit {
namespace {

// 127 * 128: the largest code of 15 bits.
constexpr int kA15Levels = 127 * 128;

constexpr int kUnitInputs = 4;
constexpr int kUnitBytes = 64;
// Floats that memory delivers together.
constexpr int kLineFloats = 16;

// Rows of activations per pass over a tile: the tile comes from memory and is unpacked once per pass, while the rows
// stay in a cache of about this size. A multiple of the rows that kernels take at a time: 32, 6, 4, 3.
constexpr int kPassBytes = 2 << 20;
constexpr int kRowStep = 96;
constexpr int kMaxPassRows = 4 * kRowStep;

int pass_rows(const QuantizedRows& x) {
  const int step = kPassBytes / x.ld / kRowStep * kRowStep;
  return std::min(x.n_rows, std::clamp(step, kRowStep, kMaxPassRows));
}

// Rows of a dense matrix that stay in cache while activations pass over them.
constexpr int kDenseRows = 32;
// Fewer rows: each thread finds the weights of its last step near its core.
constexpr int kDynamicRows = 64;

int n_tiles(const PackedMatrix& matrix) {
  const int rows = matrix.bf16 ? kDenseRows : tile_rows(matrix.encoding);
  return (matrix.n + rows - 1) / rows;
}

// Exact sums [m, tile_rows] of one tile over one scale group, for rows [row, row + m) of one plane, or of both where m
// reaches beyond the first. part: room for as many.
void dot_group(const Kernels& kernels, const PackedMatrix& matrix, int tile, int group, const QuantizedRows& x,
               int plane, int row, int m, std::int32_t* sums, std::int32_t* part) {
  const std::size_t ld = x.ld;
  const std::uint8_t* units = matrix.data + tile * (ld / kUnitInputs) * kUnitBytes;
  const std::int8_t* codes = x.row_codes(plane, row);
  const auto dot_tile = kernels.dot_tile[static_cast<int>(matrix.encoding)];
  for (int i = 0; i < x.chunks.per_group; ++i) {
    const int chunk = group * x.chunks.per_group + i;
    const std::size_t begin = x.chunks.begin(chunk);
    const std::int32_t* code_sums =
        x.sums.get() + (static_cast<std::size_t>(chunk) * x.n_planes + plane) * x.n_rows + row;
    dot_tile(units + begin / kUnitInputs * kUnitBytes, codes + begin, x.ld, code_sums, m, x.chunks.length(chunk),
             i == 0 ? sums : part);
    if (i > 0) {
      const int n = m * tile_rows(matrix.encoding);
      for (int j = 0; j < n; ++j) sums[j] += part[j];
    }
  }
}

void dense_tile(const Kernels& kernels, const LinearOutput& output, int tile, const QuantizedRows& x) {
  const PackedMatrix& matrix = *output.matrix;
  const int first = tile * kDenseRows;
  const int n = std::min(kDenseRows, matrix.n - first);
  const std::uint16_t* w = matrix.bf16 + static_cast<std::size_t>(first) * x.ld;
  kernels.dot_bf16(w, x.ld, n, x.floats.get(), x.ld, x.n_rows, matrix.k, output.y + first, matrix.n);
}

// Outputs of one tile, [m, ldy], for rows [row, row + m). sums, part: room for m sums of each plane.
void scaled_tile(const Kernels& kernels, const PackedMatrix& matrix, int tile, const QuantizedRows& x, int row, int m,
                 std::int32_t* sums, std::int32_t* part, float* y, std::ptrdiff_t ldy) {
  const int rows = tile_rows(matrix.encoding);
  const int first = tile * rows;
  const int n = std::min(rows, matrix.n - first);
  const int n_groups = x.chunks.n_groups;
  const float* w_scale = matrix.scale + (matrix.scale_per_row ? first : 0);
  float of_group[kMaxTileRows];
  std::int32_t* lo = x.n_planes == 2 ? sums + static_cast<std::ptrdiff_t>(m) * rows : nullptr;
  for (int group = 0; group < n_groups; ++group) {
    if (n_groups > 1) {
      const float* scale = matrix.scale + static_cast<std::ptrdiff_t>(first) * n_groups + group;
      for (std::ptrdiff_t j = 0; j < n; ++j) of_group[j] = scale[j * n_groups];
      w_scale = of_group;
      // The scales of a tile are read across, which no machine foresees: ask for a share of the next tile's.
      const float* next = matrix.scale + static_cast<std::ptrdiff_t>(first + rows) * n_groups + group * rows;
      for (int j = 0; j < rows && first + rows < matrix.n; j += kLineFloats) __builtin_prefetch(next + j);
    }
    if (m == x.n_rows) {
      dot_group(kernels, matrix, tile, group, x, 0, row, x.n_planes * m, sums, part);
    } else {
      dot_group(kernels, matrix, tile, group, x, 0, row, m, sums, part);
      if (lo) dot_group(kernels, matrix, tile, group, x, 1, row, m, lo, part);
    }
    const float* x_scale = group + 1 == n_groups ? x.scale.get() + row : nullptr;
    kernels.scale_sums(sums, lo, rows, w_scale, matrix.scale_per_row, x_scale, m, n, group > 0, y, ldy);
  }
}

void output_tile(const Kernels& kernels, const LinearOutput& output, int tile, const QuantizedRows& x,
                 std::int32_t* sums, std::int32_t* part) {
  const PackedMatrix& matrix = *output.matrix;
  if (matrix.bf16) return dense_tile(kernels, output, tile, x);
  const int step = pass_rows(x);
  for (int row = 0; row < x.n_rows; row += step) {
    const int m = std::min(step, x.n_rows - row);
    float* y = output.y + static_cast<std::size_t>(row) * matrix.n + tile * tile_rows(matrix.encoding);
    scaled_tile(kernels, matrix, tile, x, row, m, sums, part, y, matrix.n);
  }
}

// ---- T80 to R64 ----

constexpr int kGroupRows = 16;
constexpr int kGroupsT80 = tile_rows(Encoding::kT80) / kGroupRows;
constexpr int kGroupsR64 = tile_rows(Encoding::kR64) / kGroupRows;

// Puts digit kDigit of the T80 bytes of a unit into field `field` of its R64 bytes.
template <int kDigit>
void copy_digit(const std::uint8_t* t80, int field, std::uint8_t* r64) {
  for (int i = 0; i < kUnitBytes; ++i) {
    std::uint8_t x = t80[i];
    for (int j = 0; j < kDigit; ++j) x = static_cast<std::uint8_t>(x + x + x);
    // 3 x / 256.
    const int digit = (x > 85) + (x > 170);
    r64[i] = static_cast<std::uint8_t>(r64[i] | digit << 2 * field);
  }
}

constexpr void (*kCopyDigit[kGroupsT80])(const std::uint8_t*, int, std::uint8_t*) = {
    copy_digit<0>, copy_digit<1>, copy_digit<2>, copy_digit<3>, copy_digit<4>};

}  // namespace

PackedMatrix to_r64(ThreadPool& pool, const PackedMatrix& t80, Buffer<std::uint8_t>& data) {
  PackedMatrix r64 = t80;
  r64.encoding = Encoding::kR64;
  const std::size_t tile_bytes = static_cast<std::size_t>(pad_inputs(t80.k)) / kUnitInputs * kUnitBytes;
  const int n_groups = n_tiles(t80) * kGroupsT80;
  data.reserve(n_tiles(r64) * tile_bytes);
  pool.run(n_tiles(r64), [&](int, int begin, int end) {
    for (int tile = begin; tile < end; ++tile) {
      std::uint8_t* to = data.get() + tile * tile_bytes;
      for (std::size_t at = 0; at < tile_bytes; at += kUnitBytes) {
        std::fill_n(to + at, kUnitBytes, std::uint8_t{0});
        for (int field = 0; field < kGroupsR64; ++field) {
          const int group = tile * kGroupsR64 + field;
          // Rows beyond the last T80 tile are never looked at, and stay zeros.
          if (group >= n_groups) break;
          const std::uint8_t* from = t80.data + group / kGroupsT80 * tile_bytes + at;
          kCopyDigit[group % kGroupsT80](from, field, to + at);
        }
      }
    }
  });
  r64.data = data.get();
  return r64;
}

namespace {

// Zeros the codes of values below the median magnitude; those that equal it stay. As whole numbers the bits of magnitudes
// have their order, and NaN a place in it.
void keep_larger_half(const float* x, int n, std::uint32_t* magnitudes, std::int8_t* codes) {
  const auto magnitude = [&](int i) { return std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFF; };
  for (int i = 0; i < n; ++i) magnitudes[i] = magnitude(i);
  std::uint32_t* least = magnitudes + std::min(n - n / 2, n - 1);
  std::nth_element(magnitudes, least, magnitudes + n);
  for (int i = 0; i < n; ++i) {
    if (magnitude(i) < *least) codes[i] = 0;
  }
}

}  // namespace

Chunks Chunks::of(const PackedMatrix& matrix) {
  const int group = matrix.group ? matrix.group : pad_inputs(matrix.k);
  return {group, pad_inputs(matrix.k) / group, (group + kMaxDotInputs - 1) / kMaxDotInputs};
}

int Chunks::length(int chunk) const { return std::min(kMaxDotInputs, group - chunk % per_group * kMaxDotInputs); }

void QuantizedRows::resize(const PackedMatrix& matrix, int rows, Activations kind, bool keep_floats) {
  activations = kind;
  n_rows = rows;
  n_planes = kind == Activations::kA15 ? 2 : 1;
  k = matrix.k;
  ld = pad_inputs(k);
  keeps_floats = keep_floats || kind == Activations::kNone;
  if (keeps_floats) floats.reserve(static_cast<std::size_t>(rows) * ld);
  if (kind == Activations::kNone) return;
  chunks = Chunks::of(matrix);
  codes.reserve(static_cast<std::size_t>(rows) * n_planes * ld);
  sums.reserve(static_cast<std::size_t>(rows) * n_planes * chunks.count());
  scale.reserve(rows);
  if (kind == Activations::kA8Half) magnitudes.reserve(static_cast<std::size_t>(rows) * k);
}

void QuantizedRows::write(const Kernels& kernels, const float* x, int row) {
  if (keeps_floats) std::copy_n(x, k, floats.get() + static_cast<std::size_t>(row) * ld);
  switch (activations) {
    case Activations::kNone:
      return;
    case Activations::kA15:
      kernels.quantize_a15(x, k, ld, row_codes(0, row), row_codes(1, row), scale.get() + row);
      break;
    case Activations::kA8:
      kernels.quantize_a8(x, k, ld, row_codes(0, row), scale.get() + row);
      break;
    case Activations::kA8Half:
      kernels.quantize_a8(x, k, ld, row_codes(0, row), scale.get() + row);
      keep_larger_half(x, k, magnitudes.get() + static_cast<std::size_t>(row) * k, row_codes(0, row));
      break;
    case Activations::kA4:
      kernels.quantize_a4(x, k, ld, row_codes(0, row), scale.get() + row);
      break;
    case Activations::kA1:
      kernels.quantize_a1(x, k, ld, row_codes(0, row), scale.get() + row);
      break;
  }
  for (int chunk = 0; chunk < chunks.count(); ++chunk) {
    for (int plane = 0; plane < n_planes; ++plane) {
      sums.get()[(static_cast<std::size_t>(chunk) * n_planes + plane) * n_rows + row] =
          kernels.sum_codes(row_codes(plane, row) + chunks.begin(chunk), chunks.length(chunk));
    }
  }
}

namespace {

template <class Value>
CodeCounts count_values(int n, int least, int largest, Value value) noexcept {
  int saturated = 0;
  int zero = 0;
  for (int i = 0; i < n; ++i) {
    saturated += value(i) <= least || value(i) >= largest;
    zero += value(i) == 0;
  }
  return {saturated, zero};
}

}  // namespace

CodeCounts QuantizedRows::count(int row) const noexcept {
  constexpr int kNever = 1 << 20;
  if (activations == Activations::kNone) {
    const float* x = floats.get() + static_cast<std::size_t>(row) * ld;
    return count_values(k, -kNever, kNever, [x](int i) { return x[i] != 0.0f; });
  }
  const std::int8_t* codes_K = row_codes(0, row);
  const auto code = [codes_K](int i) { return int{codes_K[i]}; };
  switch (activations) {
    case Activations::kA15: {
      const std::int8_t* lo_K = row_codes(1, row);
      return count_values(k, -kA15Levels, kA15Levels, [=](int i) { return codes_K[i] * 128 + lo_K[i]; });
    }
    case Activations::kA4:
      return count_values(k, -8, 7, code);
    case Activations::kA1:
      return count_values(k, -kNever, kNever, code);
    default:
      return count_values(k, -127, 127, code);
  }
}

std::int32_t* QuantizedRows::tile_sums(int share, int i) const {
  return acc.get() + (static_cast<std::size_t>(share) * kSumTiles + i) * pass_rows(*this) * kMaxTileRows;
}

void linear(const Kernels& kernels, ThreadPool& pool, std::span<const LinearOutput> outputs, QuantizedRows& x) {
  x.acc.reserve(static_cast<std::size_t>(pool.size()) * QuantizedRows::kSumTiles * pass_rows(x) * kMaxTileRows);
  int total = 0;
  for (const LinearOutput& output : outputs) total += n_tiles(*output.matrix);
  const auto compute = [&](int share, int begin, int end) {
    int first = 0;
    for (const LinearOutput& output : outputs) {
      const int n = n_tiles(*output.matrix);
      for (int item = std::max(begin, first); item < std::min(end, first + n); ++item) {
        output_tile(kernels, output, item - first, x, x.tile_sums(share, 0), x.tile_sums(share, x.n_planes));
      }
      first += n;
    }
  };
  if (x.n_rows < kDynamicRows) {
    pool.run(total, compute);
  } else {
    pool.run_dynamic(total, compute);
  }
}

void linear_tile(const Kernels& kernels, const PackedMatrix& matrix, int tile, const QuantizedRows& x, int row,
                 float* y) noexcept {
  alignas(64) std::int32_t sums[2 * kMaxTileRows], part[2 * kMaxTileRows];
  scaled_tile(kernels, matrix, tile, x, row, 1, sums, part, y, matrix.n);
}

}  // namespace onebit
