// Attention of a ragged batch over the key-value cache, split over threads by tokens, key-value heads and splits of the
// keys.
//
// Shape suffixes: T tokens, N heads, K kv heads, G heads that share one of them, H d_head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "onebit/buffer.h"
#include "onebit/kernels.h"
#include "onebit/kv_cache.h"
#include "onebit/threads.h"
#include "onebit/types.h"

namespace onebit {

class Attention {
 public:
  Attention(const Kernels& kernels, int n_heads, int n_kv_heads, int d_head, int n_threads);
  ~Attention();

  // Divides a batch into work and makes room for it. Throws std::bad_alloc.
  void begin(const Batch& batch, KvFormat format);

  // x = softmax(x k / sqrt(H)) v over the keys up to each token's own, which are in the cache already; x: float32
  // [T, N, H]. The batch is that of begin().
  void run(ThreadPool& pool, const Batch& batch, const KvCache& cache, int layer, float* x_TNH) noexcept;

 private:
  // Consecutive tokens of one sequence that pass over its keys together.
  struct Chunk {
    int seq;
    int begin;
    int end;
  };
  // Softmax state of the heads of a chunk: m and l are [T, G], o is [T, G, H] with tokens `stride` apart.
  struct Partial {
    float* m;
    float* l;
    float* o;
    std::ptrdiff_t stride;
  };
  // One chunk, one head, and what a thread needs for them.
  struct Work;
  class Reader;
  struct Scratch;

  std::size_t partial_floats() const;
  Partial partial(float* memory) const;
  void take_queries(const Work& work) const noexcept;
  void attend(const Work& work, int split, const Partial& to) const noexcept;
  void attend_floats(const Work& work, int split, const Partial& to) const noexcept;
  void attend_int8(const Work& work, int split, const Partial& to) const noexcept;
  void dot_tiles(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, int n_tiles, const std::int8_t* x,
                 std::ptrdiff_t ldx, const std::int32_t* sums, int m, int k, std::int32_t* out,
                 Reader& reader) const noexcept;
  void merge(const Work& work, int split, const Partial& from, const Partial& to) const noexcept;
  void divide(const Work& work, const Partial& of) const noexcept;

  const Kernels& kernels_;
  int n_heads_;
  int n_kv_heads_;
  int d_head_;
  int group_;
  int n_threads_;
  float inv_sqrt_d_;
  int chunk_tokens_ = 1;
  int n_splits_ = 1;
  bool split_apart_ = false;  // whether splits are work of their own
  std::vector<Chunk> chunks_;
  std::vector<Scratch> scratch_;  // per share of a region
  Buffer<float> partials_;        // of all splits, where they are work of their own
};

}  // namespace onebit
