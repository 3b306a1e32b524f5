// Keys and values of all sequences, in blocks of kBlockTokens positions. Who owns which block is decided outside: a
// sequence brings its block table.
//
// One page holds one block of one key-value head in one layer:
//
//   bf16, fp8          keys [64, d], values [64, d]
//   int8               keys as 4 tiles of Q8 (rows are keys, inputs are d padded to 16), values as d / 16 tiles of Q8
//                      (rows are elements of a value, inputs are its 64 keys), float32 key scales [64], value scales [64]
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "onebit/kernels.h"
#include "onebit/types.h"

namespace onebit {

class KvCache {
 public:
  // All zeros. Throws std::bad_alloc, also when the size does not fit into memory addresses.
  KvCache(KvFormat format, int n_layers, int n_kv_heads, int d_head, int n_blocks);

  KvFormat format() const { return format_; }
  int n_layers() const { return n_layers_; }
  int n_kv_heads() const { return n_kv_heads_; }
  int d_head() const { return d_head_; }
  int n_blocks() const { return n_blocks_; }
  std::size_t bytes() const { return n_pages_ * page_bytes_; }

  std::ptrdiff_t page_bytes() const { return static_cast<std::ptrdiff_t>(page_bytes_); }

  // Parts of the page of one head in one block, each aligned to 64 bytes.
  const std::uint8_t* keys(int layer, int block, int kv_head) const { return page(layer, block, kv_head); }
  const std::uint8_t* values(int layer, int block, int kv_head) const {
    return page(layer, block, kv_head) + side_bytes_;
  }
  const float* key_scales(int layer, int block, int kv_head) const {
    return reinterpret_cast<const float*>(page(layer, block, kv_head) + 2 * side_bytes_);
  }
  const float* value_scales(int layer, int block, int kv_head) const {
    return key_scales(layer, block, kv_head) + kBlockTokens;
  }

  // Keys and values of a block as attention reads them: float32 [2, n_kv_heads, kBlockTokens, d_head].
  void read(int layer, int block, float* out) const noexcept;

  // Puts a key and a value, float32 [d_head], at position `slot` of a block.
  void store(const Kernels& kernels, int layer, int block, int kv_head, int slot, const float* key,
             const float* value) noexcept;

 private:
  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };

  float number(int layer, int block, int kv_head, bool is_key, int slot, int i) const noexcept;

  std::uint8_t* page(int layer, int block, int kv_head) const {
    const std::size_t index = (static_cast<std::size_t>(layer) * n_blocks_ + block) * n_kv_heads_ + kv_head;
    return first_page_ + index * page_bytes_;
  }

  KvFormat format_;
  int n_layers_;
  int n_kv_heads_;
  int d_head_;
  int n_blocks_;
  std::size_t side_bytes_;  // of the keys of a page, and of its values
  std::size_t page_bytes_;
  std::size_t n_pages_;
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::uint8_t* first_page_;
};

}  // namespace onebit
