// Keys and values of all sequences as bfloat16, in blocks of kBlockTokens positions. Who owns which block is decided
// outside: a sequence brings its block table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "onebit/types.h"

namespace onebit {

class KvCache {
 public:
  // All zeros. Throws std::bad_alloc, also when the size does not fit into memory addresses.
  KvCache(int n_layers, int n_kv_heads, int d_head, int n_blocks);

  int n_layers() const { return n_layers_; }
  int n_kv_heads() const { return n_kv_heads_; }
  int d_head() const { return d_head_; }
  int n_blocks() const { return n_blocks_; }
  std::size_t bytes() const { return 2 * size_ * sizeof(std::uint16_t); }

  // bfloat16 [kBlockTokens, d_head] of one head in one block.
  std::uint16_t* keys(int layer, int block, int kv_head) { return keys_.get() + offset(layer, block, kv_head); }
  std::uint16_t* values(int layer, int block, int kv_head) { return values_.get() + offset(layer, block, kv_head); }

 private:
  struct Free {
    void operator()(std::uint16_t* p) const { std::free(p); }
  };
  using Storage = std::unique_ptr<std::uint16_t, Free>;

  static Storage zeros(std::size_t n);

  std::size_t offset(int layer, int block, int kv_head) const {
    const std::size_t page = (static_cast<std::size_t>(layer) * n_blocks_ + block) * n_kv_heads_ + kv_head;
    return page * kBlockTokens * d_head_;
  }

  int n_layers_;
  int n_kv_heads_;
  int d_head_;
  int n_blocks_;
  std::size_t size_;
  Storage keys_;
  Storage values_;
};

}  // namespace onebit
