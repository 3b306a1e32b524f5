#include "onebit/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace onebit {
namespace {

// Query heads of a chunk: enough to read keys rarely, few enough that their products stay in cache.
constexpr int kChunkHeads = 64;
// Splits become work of their own where there would be fewer pieces of it for each thread.
constexpr int kPiecesPerThread = 4;
constexpr int kLanes = tile_rows(Encoding::kQ8);
// Most rows of activations that pass over two tiles at once.
constexpr int kPairRows = 16;

int n_splits(int n_keys) { return (n_keys + kSplitTokens - 1) / kSplitTokens; }

}  // namespace

struct Attention::Scratch {
  Buffer<float> partial;
  Buffer<float> q_GH;  // of one token, whose place its output takes
  // For int8, with M = 2 T G planes of T * G queries, ordered [T, hi and lo, G].
  Buffer<std::int8_t> codes_MH;
  Buffer<std::int32_t> sums_M;
  Buffer<float> scale_TG;
  Buffer<std::int32_t> products;
  Buffer<std::int8_t> weights_MJ;  // [M, kBlockTokens]
  Buffer<std::int32_t> weight_sums_M;
  Buffer<Int8Weights> weights_TG;
};

// Asks for the next page of the cache in portions between pieces of arithmetic: pages lie apart, so the machine cannot
// guess where reading goes on, and it takes only so many requests at a time.
class Attention::Reader {
 public:
  Reader(const std::uint8_t* page, std::ptrdiff_t n_bytes, int n_portions)
      : at_(page), end_(page + n_bytes), portion_((n_bytes / n_portions + kLine) / kLine * kLine) {}

  void next() {
    const std::uint8_t* stop = std::min(at_ + portion_, end_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr std::ptrdiff_t kLine = 64;
  const std::uint8_t* at_;
  const std::uint8_t* end_;
  std::ptrdiff_t portion_;
};

struct Attention::Work {
  const Batch& batch;
  const KvCache& cache;
  int layer;
  Chunk chunk;
  int kv_head;
  const float* q;  // of the chunk's first token and head; tokens n_heads * d_head apart
  Scratch& scratch;

  const std::int32_t* table() const {
    return batch.block_tables + static_cast<std::size_t>(chunk.seq) * batch.table_width;
  }
  int n_keys(int t) const { return batch.positions[t] + 1; }
  int n_keys() const { return n_keys(chunk.end - 1); }
  // The first token of the chunk that sees a key at `start`; the last one does.
  int first_token(int start) const { return std::max(chunk.begin, chunk.end - (n_keys() - start)); }
};

Attention::Attention(const Kernels& kernels, int n_heads, int n_kv_heads, int d_head, int n_threads)
    : kernels_(kernels),
      n_heads_(n_heads),
      n_kv_heads_(n_kv_heads),
      d_head_(d_head),
      group_(n_heads / n_kv_heads),
      n_threads_(n_threads),
      inv_sqrt_d_(1.0f / std::sqrt(static_cast<float>(d_head))),
      scratch_(static_cast<std::size_t>(n_threads)) {}

Attention::~Attention() = default;

void Attention::begin(const Batch& batch, KvFormat format) {
  chunk_tokens_ = format == KvFormat::kInt8 ? std::max(1, kChunkHeads / group_) : 1;
  n_splits_ = 1;
  chunks_.clear();
  for (int seq = 0; seq < batch.n_seqs; ++seq) {
    for (int t = batch.seq_starts[seq]; t < batch.seq_starts[seq + 1]; t += chunk_tokens_) {
      const int end = std::min(batch.seq_starts[seq + 1], t + chunk_tokens_);
      chunks_.push_back({seq, t, end});
      n_splits_ = std::max(n_splits_, n_splits(batch.positions[end - 1] + 1));
    }
  }
  const std::size_t n_pieces = chunks_.size() * static_cast<std::size_t>(n_kv_heads_);
  split_apart_ = n_threads_ > 1 && n_splits_ > 1 && n_pieces < static_cast<std::size_t>(kPiecesPerThread * n_threads_);

  const std::size_t heads = static_cast<std::size_t>(chunk_tokens_) * group_;
  if (split_apart_) partials_.reserve(n_pieces * n_splits_ * partial_floats());
  for (Scratch& scratch : scratch_) {
    scratch.partial.reserve(2 * partial_floats());
    if (format != KvFormat::kInt8) {
      scratch.q_GH.reserve(static_cast<std::size_t>(group_) * d_head_);
      continue;
    }
    const std::size_t width = pad_inputs(d_head_);
    scratch.codes_MH.reserve(2 * heads * width);
    scratch.sums_M.reserve(2 * heads);
    scratch.scale_TG.reserve(heads);
    scratch.products.reserve(2 * heads * std::max<std::size_t>(kBlockTokens, width));
    scratch.weights_MJ.reserve(2 * heads * kBlockTokens);
    scratch.weight_sums_M.reserve(2 * heads);
    scratch.weights_TG.reserve(heads);
  }
}

std::size_t Attention::partial_floats() const {
  return static_cast<std::size_t>(chunk_tokens_) * group_ * (2 + d_head_);
}

Attention::Partial Attention::partial(float* memory) const {
  const std::ptrdiff_t heads = static_cast<std::ptrdiff_t>(chunk_tokens_) * group_;
  return {memory, memory + heads, memory + 2 * heads, static_cast<std::ptrdiff_t>(group_) * d_head_};
}

void Attention::run(ThreadPool& pool, const Batch& batch, const KvCache& cache, int layer, float* x_TNH) noexcept {
  const int n_pieces = static_cast<int>(chunks_.size()) * n_kv_heads_;
  const std::ptrdiff_t width = static_cast<std::ptrdiff_t>(n_heads_) * d_head_;
  const auto work_of = [&](int share, int piece) {
    const Chunk& chunk = chunks_[static_cast<std::size_t>(piece / n_kv_heads_)];
    const int kv_head = piece % n_kv_heads_;
    const float* q = x_TNH + chunk.begin * width + kv_head * group_ * d_head_;
    return Work{batch, cache, layer, chunk, kv_head, q, scratch_[static_cast<std::size_t>(share)]};
  };
  const auto split_partial = [&](int piece, int split) {
    return partial(partials_.get() + (static_cast<std::size_t>(piece) * n_splits_ + split) * partial_floats());
  };
  // m and l of a piece lie in scratch, its o where it belongs.
  const auto result_of = [&](const Work& work) {
    Partial result = partial(work.scratch.partial.get());
    result.o = x_TNH + work.chunk.begin * width + work.kv_head * group_ * d_head_;
    result.stride = width;
    return result;
  };
  const auto first_split = [&](const Work& work, const Partial& split) {
    const Partial result = result_of(work);
    const int n_tokens = work.chunk.end - work.chunk.begin;
    std::copy_n(split.m, n_tokens * group_, result.m);
    std::copy_n(split.l, n_tokens * group_, result.l);
    for (int t = 0; t < n_tokens; ++t) {
      std::copy_n(split.o + t * split.stride, group_ * d_head_, result.o + t * result.stride);
    }
    return result;
  };

  // Dealt out in turn: later tokens see more keys, so contiguous shares would be uneven.
  pool.run(n_threads_, [&](int share, int, int) {
    const int n_items = split_apart_ ? n_pieces * n_splits_ : n_pieces;
    for (int item = share; item < n_items; item += n_threads_) {
      const int piece = split_apart_ ? item / n_splits_ : item;
      const Work work = work_of(share, piece);
      const int n = n_splits(work.n_keys());
      take_queries(work);
      if (split_apart_) {
        const int split = item % n_splits_;
        if (split < n) attend(work, split, split_partial(piece, split));
        continue;
      }
      const Partial result = result_of(work);
      const Partial next = partial(work.scratch.partial.get() + partial_floats());
      attend(work, 0, result);
      for (int split = 1; split < n; ++split) {
        attend(work, split, next);
        merge(work, split, next, result);
      }
      divide(work, result);
    }
  });
  if (!split_apart_) return;
  pool.run(n_pieces, [&](int share, int begin, int end) {
    for (int piece = begin; piece < end; ++piece) {
      const Work work = work_of(share, piece);
      const Partial result = first_split(work, split_partial(piece, 0));
      for (int split = 1; split < n_splits(work.n_keys()); ++split) {
        merge(work, split, split_partial(piece, split), result);
      }
      divide(work, result);
    }
  });
}

void Attention::attend(const Work& work, int split, const Partial& to) const noexcept {
  if (work.cache.format() == KvFormat::kInt8) {
    attend_int8(work, split, to);
  } else {
    attend_floats(work, split, to);
  }
}

void Attention::attend_floats(const Work& work, int split, const Partial& to) const noexcept {
  // And the one that comes next, or the last once more.
  const void* k_blocks[kSplitBlocks + 1];
  const void* v_blocks[kSplitBlocks + 1];
  const int start = split * kSplitTokens;
  const int last = (work.n_keys() - 1) / kBlockTokens;
  for (int b = 0; b <= kSplitBlocks; ++b) {
    const int block = work.table()[std::min(split * kSplitBlocks + b, last)];
    k_blocks[b] = work.cache.keys(work.layer, block, work.kv_head);
    v_blocks[b] = work.cache.values(work.layer, block, work.kv_head);
  }
  // A chunk is one token here: see begin().
  const int n = std::min(work.n_keys() - start, kSplitTokens);
  kernels_.attend[static_cast<int>(work.cache.format())](work.scratch.q_GH.get(), group_, d_head_, inv_sqrt_d_,
                                                         k_blocks, v_blocks, n, to.m, to.l, to.o);
}

void Attention::take_queries(const Work& work) const noexcept {
  Scratch& s = work.scratch;
  if (work.cache.format() != KvFormat::kInt8) {
    std::copy_n(work.q, group_ * d_head_, s.q_GH.get());
    return;
  }
  const int width = pad_inputs(d_head_);
  for (int t = 0; t < work.chunk.end - work.chunk.begin; ++t) {
    const float* q_GH = work.q + static_cast<std::ptrdiff_t>(t) * n_heads_ * d_head_;
    for (int g = 0; g < group_; ++g) {
      const int hi = 2 * t * group_ + g;
      const int lo = hi + group_;
      std::int8_t* planes[] = {s.codes_MH.get() + static_cast<std::ptrdiff_t>(hi) * width,
                               s.codes_MH.get() + static_cast<std::ptrdiff_t>(lo) * width};
      float scale;
      kernels_.quantize_a15(q_GH + g * d_head_, d_head_, width, planes[0], planes[1], &scale);
      s.scale_TG.get()[t * group_ + g] = scale * inv_sqrt_d_;
      s.sums_M.get()[hi] = kernels_.sum_codes(planes[0], width);
      s.sums_M.get()[lo] = kernels_.sum_codes(planes[1], width);
    }
  }
}

// Exact sums [tiles, m, 16] of Q8 tiles that lie tile_bytes apart.
void Attention::dot_tiles(const std::uint8_t* tiles, std::ptrdiff_t tile_bytes, int n_tiles, const std::int8_t* x,
                          std::ptrdiff_t ldx, const std::int32_t* sums, int m, int k, std::int32_t* out,
                          Reader& reader) const noexcept {
  const auto dot_tile = kernels_.dot_tile[static_cast<int>(Encoding::kQ8)];
  const std::ptrdiff_t ld = static_cast<std::ptrdiff_t>(m) * kLanes;
  int tile = 0;
  if (kernels_.dot_pair && m <= kPairRows) {
    for (; tile + 2 <= n_tiles; tile += 2) {
      reader.next();
      kernels_.dot_pair(tiles + tile * tile_bytes, tile_bytes, x, ldx, sums, m, k, out + tile * ld, ld);
    }
  }
  for (; tile < n_tiles; ++tile) {
    reader.next();
    dot_tile(tiles + tile * tile_bytes, x, ldx, sums, m, k, out + tile * ld);
  }
}

void Attention::attend_int8(const Work& work, int split, const Partial& to) const noexcept {
  Scratch& s = work.scratch;
  const int width = pad_inputs(d_head_);
  const int first_of_split = work.first_token(split * kSplitTokens) - work.chunk.begin;
  for (int t = first_of_split; t < work.chunk.end - work.chunk.begin; ++t) {
    std::fill_n(to.m + t * group_, group_, -std::numeric_limits<float>::infinity());
    std::fill_n(to.l + t * group_, group_, 0.0f);
    std::fill_n(to.o + t * to.stride, group_ * d_head_, 0.0f);
  }
  // Pieces of arithmetic for a block of one token's heads; more tokens need no more.
  const int n_portions = 2 * group_ + (kBlockTokens + width) / (kernels_.dot_pair ? 2 * kLanes : kLanes);
  const int last = std::min(work.n_keys(), (split + 1) * kSplitTokens);
  for (int start = split * kSplitTokens; start < last; start += kBlockTokens) {
    const int block = work.table()[start / kBlockTokens];
    const std::uint8_t* keys = work.cache.keys(work.layer, block, work.kv_head);
    const std::uint8_t* values = work.cache.values(work.layer, block, work.kv_head);
    const float* k_scale = work.cache.key_scales(work.layer, block, work.kv_head);
    const float* v_scale = work.cache.value_scales(work.layer, block, work.kv_head);
    const int first = work.first_token(start);
    const int n_tokens = work.chunk.end - first;
    const int m = 2 * n_tokens * group_;
    const int skipped = first - work.chunk.begin;
    const int n_keys = std::min(kBlockTokens, work.n_keys() - start);
    const std::ptrdiff_t ld = static_cast<std::ptrdiff_t>(m) * kLanes;
    const int next = start + kBlockTokens < work.n_keys() ? work.table()[start / kBlockTokens + 1] : block;
    Reader reader(work.cache.keys(work.layer, next, work.kv_head), next == block ? 0 : work.cache.page_bytes(),
                  n_portions);

    dot_tiles(keys, kLanes * width, (n_keys + kLanes - 1) / kLanes,
              s.codes_MH.get() + static_cast<std::ptrdiff_t>(2 * skipped) * group_ * width, width,
              s.sums_M.get() + 2 * skipped * group_, m, width, s.products.get(), reader);
    for (int t = 0; t < n_tokens; ++t) {
      const int n = std::min(kBlockTokens, work.n_keys(first + t) - start);
      for (int g = 0; g < group_; ++g) {
        const int hi = 2 * t * group_ + g;
        const int lo = hi + group_;
        const int head = (skipped + t) * group_ + g;
        reader.next();
        Int8Weights& weights = s.weights_TG.get()[t * group_ + g];
        weights.hi = s.weights_MJ.get() + hi * kBlockTokens;
        weights.lo = s.weights_MJ.get() + lo * kBlockTokens;
        kernels_.weigh_int8(s.products.get() + hi * kLanes, s.products.get() + lo * kLanes, ld, k_scale, v_scale,
                            s.scale_TG.get()[head], n, &weights, to.m + head, to.l + head);
        s.weight_sums_M.get()[hi] = weights.hi_sum;
        s.weight_sums_M.get()[lo] = weights.lo_sum;
      }
    }
    dot_tiles(values, kLanes * kBlockTokens, width / kLanes, s.weights_MJ.get(), kBlockTokens, s.weight_sums_M.get(), m,
              pad_inputs(n_keys), s.products.get(), reader);
    for (int t = 0; t < n_tokens; ++t) {
      for (int g = 0; g < group_; ++g) {
        reader.next();
        const std::int32_t* products = s.products.get() + (2 * t * group_ + g) * kLanes;
        kernels_.mix_int8(products, products + group_ * kLanes, ld, s.weights_TG.get()[t * group_ + g], d_head_,
                          to.o + (skipped + t) * to.stride + g * d_head_);
      }
    }
  }
}

// Adds a split to those before it, for the tokens that see it.
void Attention::merge(const Work& work, int split, const Partial& from, const Partial& to) const noexcept {
  for (int t = work.first_token(split * kSplitTokens) - work.chunk.begin; t < work.chunk.end - work.chunk.begin; ++t) {
    const int head = t * group_;
    kernels_.merge_splits(group_, d_head_, from.m + head, from.l + head, from.o + t * from.stride, to.m + head,
                          to.l + head, to.o + t * to.stride);
  }
}

void Attention::divide(const Work& work, const Partial& of) const noexcept {
  for (int t = 0; t < work.chunk.end - work.chunk.begin; ++t) {
    for (int g = 0; g < group_; ++g) {
      float* o_H = of.o + t * of.stride + g * d_head_;
      for (int i = 0; i < d_head_; ++i) o_H[i] = o_H[i] / of.l[t * group_ + g];
    }
  }
}

}  // namespace onebit
