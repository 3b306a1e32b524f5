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

// The code of row group j in a packed byte; also of bytes that packing never writes.
constexpr int code_of(Encoding encoding, int byte, int j) {
  switch (encoding) {
    case Encoding::kT80:
      // 256 / 243 of a base-3 number: each multiplication by 3 carries the next digit out of the byte.
      for (int i = 0; i < j; ++i) byte = byte * 3 % 256;
      return byte * 3 / 256 - 1;
    case Encoding::kR64:
      return (byte >> 2 * j & 3) - 1;
    case Encoding::kB128:
      return 2 * (byte >> j & 1) - 1;
    case Encoding::kQ8:
      return byte - 128;
    case Encoding::kQ4:
      return (byte >> 4 * j & 15) - 8;
  }
  return 0;
}

// Inputs are padded with zeros to a multiple of this.
inline constexpr int kInputAlign = 16;
constexpr int pad_inputs(int k) { return (k + kInputAlign - 1) / kInputAlign * kInputAlign; }

// Longest run of inputs that one dot_tile call may sum: beyond 33000 the T80 identity overflows.
inline constexpr int kMaxDotInputs = 32768;

// Quantisers of a layer's input, as in quant.py; kNone keeps floats, for dense matrices.
enum class Activations { kA15, kA8, kA8Half, kA4, kA1, kNone };

// A packed matrix [n, k]: data is uint8 [ceil(n / tile_rows), pad_inputs(k) / 4, 64].
struct PackedMatrix {
  Encoding encoding;
  int n;
  int k;
  const std::uint8_t* data;
  const float* scale;  // multiplier: [1], [n], or [n, k / group]
  bool scale_per_row;  // false: one scale for the matrix
  int group;           // inputs that share a scale; 0: all of them

  // A dense matrix has this instead of codes and scales: bfloat16 [at least n, pad_inputs(k)].
  const std::uint16_t* bf16 = nullptr;
};

// What the linear layers of a transformer layer read: q, k and v share an input, and gate and up do.
enum class LayerInput { kQkv, kO, kGateUp, kDown };
inline constexpr int kLayerInputs = 4;

// Codes of an input that are the least or the largest of their quantiser (a1 has no others, and none counts), and zeros.
struct CodeCounts {
  std::int64_t saturated;
  std::int64_t zero;
};

// Sequences one after another, each a run of consecutive positions. Keys and values of its tokens go into the blocks of
// its table, and everything before them must be there already.
struct Batch {
  const std::int32_t* tokens;        // [n_tokens]
  const std::int32_t* positions;     // [n_tokens]
  const std::int32_t* seq_starts;    // [n_seqs + 1]
  const std::int32_t* block_tables;  // [n_seqs, table_width]
  const std::int32_t* rows;          // [n_rows]: the tokens whose logits are wanted
  const std::int32_t* top_k;         // [n_rows]: how many of the best of them, 0 for all; null: all
  int n_tokens;
  int n_seqs;
  int table_width;
  int n_rows;
  const std::int32_t* adapters = nullptr;  // [n_seqs]: which adapter of the model, -1 for none; null: none
  CodeCounts* code_counts = nullptr;       // [n_layers, kLayerInputs]: what is found is added; null: nobody looks
};

// Positions in one KV block; blocks in one split of the keys, the part of attention that is computed on its own. Both
// belong to the order of float sums: see docs/numerics.md.
inline constexpr int kBlockTokens = 64;
inline constexpr int kSplitBlocks = 8;
inline constexpr int kSplitTokens = kSplitBlocks * kBlockTokens;

// Number formats of the key-value cache: floats, each by itself (fp8 is e4m3), and codes with a scale for each vector.
enum class KvFormat : std::uint8_t { kBf16, kFp8, kInt8 };
inline constexpr int kKvFormats = 3;
inline constexpr int kFloatFormats = 2;
inline constexpr const char* kKvFormatNames[kKvFormats] = {"bf16", "fp8", "int8"};
// Widest head of an int8 cache: 127 * (127 * 128 + 64) * d must fit an int32.
inline constexpr int kMaxInt8Head = 1024;

}  // namespace onebit
