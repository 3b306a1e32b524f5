#include "onebit/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace onebit {
namespace {

constexpr std::size_t kAlign = 64;

std::size_t product(std::initializer_list<std::size_t> factors) {
  std::size_t result = 1;
  for (const std::size_t factor : factors) {
    if (result > std::numeric_limits<std::size_t>::max() / 4 / factor) throw std::bad_alloc();
    result *= factor;
  }
  return result;
}

std::size_t number_bytes(KvFormat format) { return format == KvFormat::kBf16 ? 2 : 1; }

std::size_t side_bytes(KvFormat format, int d_head) {
  const int width = format == KvFormat::kInt8 ? pad_inputs(d_head) : d_head;
  return static_cast<std::size_t>(kBlockTokens) * static_cast<std::size_t>(width) * number_bytes(format);
}

float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

float from_fp8(std::uint8_t bits) {
  const int exponent = bits >> 3 & 15;
  const int mantissa = (bits & 7) + (exponent > 0 ? 8 : 0);
  const float value = std::ldexp(static_cast<float>(mantissa), std::max(exponent, 1) - 10);
  return bits & 0x80 ? -value : value;
}

// The codes of one row of a Q8 tile, 4 to a unit.
void store_key(const std::int8_t* codes, int d, int slot, std::uint8_t* tiles) noexcept {
  constexpr int kRows = tile_rows(Encoding::kQ8);
  std::uint8_t* lane = tiles + slot / kRows * kRows * d + 4 * (slot % kRows);
  for (int i = 0; i < d; ++i) lane[i / 4 * 64 + i % 4] = static_cast<std::uint8_t>(codes[i] + 128);
}

// One input of all rows of some Q8 tiles of kBlockTokens inputs.
void store_value(const std::int8_t* codes, int d, int slot, std::uint8_t* tiles) noexcept {
  constexpr int kRows = tile_rows(Encoding::kQ8);
  std::uint8_t* first = tiles + slot / 4 * 64 + slot % 4;
  for (int i = 0; i < d; ++i) {
    first[i / kRows * kRows * kBlockTokens + 4 * (i % kRows)] = static_cast<std::uint8_t>(codes[i] + 128);
  }
}

}  // namespace

KvCache::KvCache(KvFormat format, int n_layers, int n_kv_heads, int d_head, int n_blocks)
    : format_(format),
      n_layers_(n_layers),
      n_kv_heads_(n_kv_heads),
      d_head_(d_head),
      n_blocks_(n_blocks),
      side_bytes_(side_bytes(format, d_head)),
      page_bytes_(2 * side_bytes_ + (format == KvFormat::kInt8 ? 2 * kBlockTokens * sizeof(float) : 0)),
      n_pages_(product({static_cast<std::size_t>(n_layers), static_cast<std::size_t>(n_blocks),
                        static_cast<std::size_t>(n_kv_heads), page_bytes_}) /
               page_bytes_),
      // calloc leaves memory untouched until a block is used.
      memory_(static_cast<std::uint8_t*>(std::calloc(bytes() + kAlign, 1))) {
  if (!memory_) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
  first_page_ = memory_.get() + (kAlign - address % kAlign) % kAlign;
}

void KvCache::store(const Kernels& kernels, int layer, int block, int kv_head, int slot, const float* key,
                    const float* value) noexcept {
  std::uint8_t* keys = page(layer, block, kv_head);
  std::uint8_t* values = keys + side_bytes_;
  if (format_ != KvFormat::kInt8) {
    const std::size_t at = static_cast<std::size_t>(slot) * static_cast<std::size_t>(d_head_) * number_bytes(format_);
    kernels.to_cache[static_cast<int>(format_)](key, d_head_, keys + at);
    kernels.to_cache[static_cast<int>(format_)](value, d_head_, values + at);
    return;
  }
  float* scales = reinterpret_cast<float*>(values + side_bytes_);
  std::int8_t codes[kMaxInt8Head];
  const int width = pad_inputs(d_head_);
  kernels.quantize_a8(key, d_head_, width, codes, scales + slot);
  store_key(codes, width, slot, keys);
  kernels.quantize_a8(value, d_head_, width, codes, scales + kBlockTokens + slot);
  store_value(codes, width, slot, values);
}

float KvCache::number(int layer, int block, int kv_head, bool is_key, int slot, int i) const noexcept {
  const std::uint8_t* numbers = is_key ? keys(layer, block, kv_head) : values(layer, block, kv_head);
  if (format_ == KvFormat::kBf16) return from_bf16(reinterpret_cast<const std::uint16_t*>(numbers)[slot * d_head_ + i]);
  if (format_ == KvFormat::kFp8) return from_fp8(numbers[slot * d_head_ + i]);
  // As store_key and store_value put them there.
  constexpr int kRows = tile_rows(Encoding::kQ8);
  const int key_at = slot / kRows * kRows * pad_inputs(d_head_) + i / 4 * 64 + 4 * (slot % kRows) + i % 4;
  const int value_at = i / kRows * kRows * kBlockTokens + slot / 4 * 64 + 4 * (i % kRows) + slot % 4;
  const float* scales = is_key ? key_scales(layer, block, kv_head) : value_scales(layer, block, kv_head);
  return static_cast<float>(numbers[is_key ? key_at : value_at] - 128) * scales[slot];
}

void KvCache::read(int layer, int block, float* out) const noexcept {
  for (const bool is_key : {true, false}) {
    for (int head = 0; head < n_kv_heads_; ++head) {
      for (int slot = 0; slot < kBlockTokens; ++slot) {
        for (int i = 0; i < d_head_; ++i) *out++ = number(layer, block, head, is_key, slot, i);
      }
    }
  }
}

}  // namespace onebit
