// The words that kernels, model and bindings share. All memory is borrowed; nothing here owns or allocates.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onebit {

// Bit layouts of packed matrices, drawn in docs/format.md. The values are part of no file format; the names are.
enum class Encoding : std::uint8_t { kT80, kR64, kB128, kQ8, kQ4 };
inline constexpr int kEncodings = 5;
inline constexpr const char* kEncodingNames[kEncodings] = {"t80", "r64", "b128", "q8", "q4"};

// Rows of one tile. A tile is k_padded / 4 units of 64 bytes: 16 lanes x 4 consecutive k.
constexpr int tile_rows(Encoding encoding) {
  constexpr int rows[kEncodings] = {80, 64, 128, 16, 32};
  return rows[static_cast<int>(encoding)];
}
inline constexpr int kMaxTileRows = 128;

// Inputs are padded with zeros to a multiple of this.
inline constexpr int kInputAlign = 16;
constexpr int pad_inputs(int k) { return (k + kInputAlign - 1) / kInputAlign * kInputAlign; }

// Longest run of inputs that one dot_tile call may sum: beyond 33000 the T80 identity overflows.
inline constexpr int kMaxDotInputs = 32768;

// A packed matrix [n, k]: data is uint8 [ceil(n / tile_rows), pad_inputs(k) / 4, 64].
struct PackedMatrix {
  Encoding encoding;
  int n;
  int k;
  const std::uint8_t* data;
  const float* scale;  // multiplier: [1], [n], or [n, k / group]
  bool scale_per_row;  // false: one scale for the matrix
  int group;           // inputs that share a scale; 0: all of them
};

// Positions in one KV block, and the fixed length of an attention split: see docs/numerics.md.
inline constexpr int kBlockTokens = 64;

}  // namespace onebit
