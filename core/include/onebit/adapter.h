// Low-rank additions to the linear layers of some sequences of a batch: y += (B (A x)) * scale.
//
// x is the float32 input of the layer before its quantiser. Every dot product is a lane sum, so a token's numbers depend on
// nothing but its own input and adapter: sequences with different adapters, or none, share a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "onebit/buffer.h"
#include "onebit/kernels.h"
#include "onebit/threads.h"
#include "onebit/types.h"

namespace onebit {

// A float32 matrix [n, k] as a sum of bfloat16 ones, of which one dot kernel multiplies each:
// dot(x) = ((lane_sum(p0 x) + lane_sum(p1 x)) + lane_sum(p2 x)). Numbers of bfloat16 need one plane, any float32 three.
struct Planes {
  const std::uint16_t* data = nullptr;  // [n_planes, n, pad_inputs(k)]
  int n_planes = 0;
  int n = 0;
  int k = 0;
};

struct LowRank {
  Planes a;  // [rank, in]; without data nothing is added
  Planes b;  // [out, rank]
  float scale = 0.0f;
};

struct AdapterLayer {
  LowRank q, k, v, o, gate, up, down;
};
using Adapter = std::vector<AdapterLayer>;  // one for each layer of the model

struct AdaptedOutput {
  LowRank AdapterLayer::* matrix;
  float* y;  // [T, N]
  int n;
};

class Adapters {
 public:
  Adapters(std::vector<Adapter> adapters, const Kernels& kernels);

  int size() const { return static_cast<int>(adapters_.size()); }
  // Whether a token of the batch that has begun has an adapter.
  bool are_used() const { return !tokens_.empty(); }

  // Notes which tokens of a batch have an adapter.
  void begin(const Batch& batch);
  // Adds to the outputs of a layer that share the inputs x [n_tokens, ldx], which are those of tokens [first, first +
  // n_tokens) of the batch. Does nothing for tokens without an adapter. Throws std::bad_alloc.
  void add(ThreadPool& pool, int layer, std::span<const AdaptedOutput> outputs, const float* x, std::ptrdiff_t ldx,
           int first, int n_tokens);

 private:
  struct Token {
    int at;
    int adapter;
  };

  std::vector<Adapter> adapters_;
  const Kernels& kernels_;
  int max_rank_ = 0;
  std::vector<Token> tokens_;  // ascending
  Buffer<float> h_;            // A x: [tokens, outputs, pad_inputs(max_rank)]
};

}  // namespace onebit
