// Packed matrices times quantised activations, split over threads by the tiles of all matrices that share an input.
//
// Shapes: T rows of activations, K inputs, N outputs. A chunk is the longest run of inputs that belongs to one scale
// group and fits one dot_tile call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "onebit/buffer.h"
#include "onebit/kernels.h"
#include "onebit/threads.h"
#include "onebit/types.h"

namespace onebit {

// How the padded inputs of a matrix fall into scale groups and chunks.
struct Chunks {
  int group = 0;      // inputs that share a weight scale
  int n_groups = 0;   // of one row
  int per_group = 0;  // chunks in a group; all but its last are kMaxDotInputs long

  static Chunks of(const PackedMatrix& matrix);
  int count() const { return n_groups * per_group; }
  int begin(int chunk) const { return chunk / per_group * group + chunk % per_group * kMaxDotInputs; }
  int length(int chunk) const;
};

// Codes of T rows with their multipliers, or floats for dense matrices. 15-bit codes have two planes, hi and lo: first all
// rows of the one, then all of the other, so that both can be multiplied in one pass over a tile.
struct QuantizedRows {
  Activations activations = Activations::kA8;
  int n_rows = 0;
  int n_planes = 1;
  int k = 0;
  int ld = 0;
  Chunks chunks;
  Buffer<std::int8_t> codes;  // [planes, T, ld], zeros beyond K
  Buffer<std::int32_t> sums;  // [chunks, planes, T]: the sum of each chunk of codes
  Buffer<float> scale;        // [T]
  Buffer<float> floats;       // [T, ld] instead of all that, or beside it for adapters
  bool keeps_floats = false;

  Buffer<std::uint32_t> magnitudes;  // [T, K], to find the larger half of a row

  std::int8_t* row_codes(int plane, int row) const {
    return codes.get() + (static_cast<std::size_t>(plane) * n_rows + row) * ld;
  }

  // Room for the exact sums of tiles, per share of a region.
  static constexpr int kSumTiles = 4;
  Buffer<std::int32_t> acc;
  std::int32_t* tile_sums(int share, int i) const;

  // Makes room for n_rows inputs of the matrix, whose other matrices must have the same K and scale groups.
  void resize(const PackedMatrix& matrix, int n_rows, Activations activations, bool keep_floats = false);
  void write(const Kernels& kernels, const float* x, int row);
  // Of one row. Floats of dense matrices saturate nowhere.
  CodeCounts count(int row) const noexcept;
};

// A T80 matrix as R64, in data: the same weights and scales, a quarter larger.
PackedMatrix to_r64(ThreadPool& pool, const PackedMatrix& t80, Buffer<std::uint8_t>& data);

struct LinearOutput {
  const PackedMatrix* matrix;
  float* y;  // [T, N]
};

// y[t, n] = (sum over groups g, ascending, of float(acc_g) * w_scale[n, g]) * x_scale[t], for every output, where acc_g is
// hi_g * 128 + lo_g with 15-bit codes; of dense matrices lane_sum(w[n] * x[t]).
void linear(const Kernels& kernels, ThreadPool& pool, std::span<const LinearOutput> outputs, QuantizedRows& x);
// Of a packed matrix, the outputs of one tile for one row of x: at most kMaxTileRows values.
void linear_tile(const Kernels& kernels, const PackedMatrix& matrix, int tile, const QuantizedRows& x, int row,
                 float* y) noexcept;

}  // namespace onebit
