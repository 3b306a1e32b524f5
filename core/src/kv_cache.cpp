#include "onebit/kv_cache.h"

#include <limits>
#include <new>

namespace onebit {
namespace {

std::size_t product(std::initializer_list<int> factors) {
  std::size_t result = 1;
  for (const int factor : factors) {
    if (result > std::numeric_limits<std::size_t>::max() / 4 / static_cast<std::size_t>(factor)) throw std::bad_alloc();
    result *= static_cast<std::size_t>(factor);
  }
  return result;
}

}  // namespace

KvCache::KvCache(int n_layers, int n_kv_heads, int d_head, int n_blocks)
    : n_layers_(n_layers),
      n_kv_heads_(n_kv_heads),
      d_head_(d_head),
      n_blocks_(n_blocks),
      size_(product({n_layers, n_blocks, n_kv_heads, kBlockTokens, d_head})),
      keys_(zeros(size_)),
      values_(zeros(size_)) {}

// calloc leaves pages untouched until a block is used.
KvCache::Storage KvCache::zeros(std::size_t n) {
  Storage storage(static_cast<std::uint16_t*>(std::calloc(n, sizeof(std::uint16_t))));
  if (!storage) throw std::bad_alloc();
  return storage;
}

}  // namespace onebit
