// From normalised activations to logits: all of them, or for certain those that can be among the k best.
//
// docs/numerics.md defines the logits and proves the bound. Shapes: R rows of activations, D inputs, V tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "onebit/buffer.h"
#include "onebit/kernels.h"
#include "onebit/linear.h"
#include "onebit/threads.h"
#include "onebit/types.h"

namespace onebit {

// Where bf16 is null, the rows are the head, in any encoding; else they approximate it, and are Q8.
struct HeadWeights {
  PackedMatrix rows;
  const std::uint16_t* bf16 = nullptr;  // bfloat16 [V, pad_inputs(D)], zeros beyond D
  const float* bounds = nullptr;        // [2, V]: at least norm(bf16 row - Q8 row), and at least norm(bf16 row)
  bool int4_shortlist = false;          // approximate by the upper halves of Q8 codes, with a probable bound
};

class Head {
 public:
  // With an int4 shortlist, which needs Q8, reads all rows and takes half their memory. T80 becomes R64 where kernels
  // prefer it. Throws std::bad_alloc.
  Head(const HeadWeights& weights, const Kernels& kernels, ThreadPool& pool);

  // Room for n_rows of activations, [R, D]. Throws std::bad_alloc.
  float* input(int n_rows) { return h_RD_.reserve(static_cast<std::size_t>(n_rows) * weights_.rows.k); }

  // Logits [R, V] of the input. top_k: [R], or null for all logits. A row that asks for its k > 0 best may get -infinity
  // for any others; what is finite has the bits that it has among all logits. Throws std::bad_alloc.
  void forward(ThreadPool& pool, int n_rows, const std::int32_t* top_k, float* logits);

 private:
  // Row v's logit exceeds its approximation by at most errors * bounds[0][v] + norms * bounds[1][v] + rest.
  struct Bound {
    float errors;
    float norms;
    float rest;
    float threshold;  // no smaller logit is among the best
  };
  struct Scored {
    float score;
    std::int32_t id;
  };

  static bool ranks_before(const Scored& a, const Scored& b);

  void halve(ThreadPool& pool);
  void halve_tile(int tile);
  void quantize(ThreadPool& pool, int n_rows);
  Bound bound(int row) const;
  void find_best(int share, int begin, int end, int n_rows, int k, const float* logits);
  void merge_best(int n_shares, int n_rows, int row, int k);
  float threshold(const Scored* best, std::int64_t n_best, int k) const;
  void keep_candidates(int block, int n_rows, float* logits) const;
  void score_block(int block, int row, const bool* is_wanted, float* scores) const;

  HeadWeights weights_;
  const Kernels& kernels_;
  PackedMatrix shortlist_;  // Q8 or Q4; without data, there is none
  const float* bounds_;     // [2, V]
  float largest_norm_ = 0.0f;
  Buffer<std::uint8_t> r64_;
  Buffer<std::uint8_t> q4_;  // what an int4 shortlist owns
  Buffer<float> q4_scale_;   // [V]
  Buffer<float> q4_bounds_;  // [2, V]
  Buffer<float> h_RD_;
  QuantizedRows codes_;
  Buffer<Bound> bounds_R_;
  Buffer<Scored> best_;  // [shares, R, k]: of each share the best approximations, the worst of them first
  Buffer<int> n_best_;   // [shares, R]
};

}  // namespace onebit
