// Shape suffixes: T tokens, D d_model, F d_ff, N heads, K kv heads, H d_head, V vocabulary, R rows asked for.
#include "onebit/model.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <utility>

#include "onebit/buffer.h"
#include "onebit/float_mode.h"
#include "onebit/linear.h"
#include "onebit/rope.h"

namespace onebit {
namespace {

// Tokens that pass through the feed-forward layer together: enough to keep the weights read rarely, few enough that its
// wide activations stay small.
constexpr int kFfnTokens = 160;

// x = H x / sqrt(n), n a power of two: in each round sums and differences, of nearest pairs first.
void hadamard(float* x, int n) noexcept {
  for (int width = 1; width < n; width *= 2) {
    for (int first = 0; first < n; first += 2 * width) {
      for (int i = first; i < first + width; ++i) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b;
        x[i + width] = a - b;
      }
    }
  }
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace

struct Model::Workspace {
  Buffer<float> x_TD;

  // One piece of memory that attention and feed-forward layer fill by turns. y is written when the others are no longer
  // needed.
  Buffer<float> shared;
  float* q_TNH = nullptr;
  float* k_TKH = nullptr;
  float* v_TKH = nullptr;
  float* gate_TF = nullptr;  // [kFfnTokens, F]
  float* up_TF = nullptr;
  float* y_TD = nullptr;

  Buffer<float> cos_TH;  // [T, H / 2]
  Buffer<float> sin_TH;
  QuantizedRows codes;
  Buffer<std::int32_t> seq_T;  // the sequence of each token

  // Of each share of a region: two rows of the widest activation.
  Buffer<float> rows;
  int row_width = 0;

  float* row(int share, int i) { return rows.get() + (2 * static_cast<std::size_t>(share) + i) * row_width; }
};

Model::Model(const ModelConfig& config, ModelWeights weights, const Kernels& kernels, int n_threads,
             std::vector<Adapter> adapters)
    : config_(config),
      weights_(std::move(weights)),
      kernels_(kernels),
      pool_(n_threads),
      adapters_(std::move(adapters), kernels),
      attention_(kernels, config.n_heads, config.n_kv_heads, config.d_head, n_threads),
      head_(weights_.head, kernels, pool_),
      workspace_(std::make_unique<Workspace>()) {
  if (!kernels.prefers_r64) return;
  for (LayerWeights& layer : weights_.layers) {
    for (PackedMatrix* matrix : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      if (!matrix->bf16 && matrix->encoding == Encoding::kT80)
        *matrix = to_r64(pool_, *matrix, repacked_.emplace_back());
    }
  }
}

Model::~Model() = default;

void Model::forward(const Batch& batch, KvCache& cache, float* logits) {
  std::lock_guard lock(mutex_);
  StandardFloatMode float_mode;
  run_layers(batch, cache);
  norm_rows(batch, head_.input(batch.n_rows));
  head_.forward(pool_, batch.n_rows, batch.top_k, logits);
}

void Model::forward_hidden(const Batch& batch, KvCache& cache, float* hidden) {
  std::lock_guard lock(mutex_);
  StandardFloatMode float_mode;
  run_layers(batch, cache);
  norm_rows(batch, hidden);
}

void Model::run_layers(const Batch& batch, KvCache& cache) {
  reserve(batch);
  attention_.begin(batch, cache.format());
  adapters_.begin(batch);
  pool_.begin();
  embed(batch);
  for (int layer = 0; layer < config_.n_layers; ++layer) {
    attention(batch, cache, layer);
    for (int first = 0; first < batch.n_tokens; first += kFfnTokens) {
      feed_forward(batch, layer, first, std::min(batch.n_tokens - first, kFfnTokens));
    }
  }
}

void Model::reserve(const Batch& batch) {
  Workspace& w = *workspace_;
  const std::size_t t = batch.n_tokens;
  const std::size_t q_width = static_cast<std::size_t>(config_.n_heads) * config_.d_head;
  const std::size_t kv_width = static_cast<std::size_t>(config_.n_kv_heads) * config_.d_head;
  const std::size_t ffn = std::min(batch.n_tokens, kFfnTokens) * static_cast<std::size_t>(config_.d_ff);
  w.x_TD.reserve(t * config_.d_model);
  w.y_TD = w.shared.reserve(std::max({t * (q_width + 2 * kv_width), t * config_.d_model, 2 * ffn}));
  w.q_TNH = w.y_TD;
  w.k_TKH = w.q_TNH + t * q_width;
  w.v_TKH = w.k_TKH + t * kv_width;
  w.gate_TF = w.y_TD;
  w.up_TF = w.gate_TF + ffn;
  w.cos_TH.reserve(t * config_.d_head / 2);
  w.sin_TH.reserve(t * config_.d_head / 2);
  w.seq_T.reserve(t);
  w.row_width = pad_inputs(std::max({config_.d_model, config_.n_heads * config_.d_head, config_.d_ff}));
  w.rows.reserve(2 * static_cast<std::size_t>(pool_.size()) * w.row_width);
}

void Model::embed(const Batch& batch) {
  Workspace& w = *workspace_;
  const std::size_t half = config_.d_head / 2;
  for (int seq = 0; seq < batch.n_seqs; ++seq) {
    std::fill(w.seq_T.get() + batch.seq_starts[seq], w.seq_T.get() + batch.seq_starts[seq + 1], seq);
  }
  pool_.run(batch.n_tokens, [&](int, int begin, int end) {
    for (std::size_t t = begin; t < static_cast<std::size_t>(end); ++t) {
      float* x_D = w.x_TD.get() + t * config_.d_model;
      if (weights_.embed_bf16) {
        const std::size_t ld = pad_inputs(config_.d_model);
        embed_row(weights_.embed_bf16 + batch.tokens[t] * ld, config_.d_model, x_D);
      } else {
        embed_row(weights_.embed, batch.tokens[t], x_D);
      }
      rope_angles(batch.positions[t], weights_.inv_freq.data(), config_.d_head / 2, config_.rope_attention_factor,
                  w.cos_TH.get() + t * half, w.sin_TH.get() + t * half);
    }
  });
}

void Model::attention(const Batch& batch, KvCache& cache, int layer) {
  Workspace& w = *workspace_;
  const LayerWeights& weights = weights_.layers[layer];
  const int d_model = config_.d_model;
  const int d_head = config_.d_head;
  const int n_kv_heads = config_.n_kv_heads;
  const int q_width = config_.n_heads * d_head;
  const int kv_width = n_kv_heads * d_head;

  w.codes.resize(weights.q, batch.n_tokens, config_.activations, adapters_.are_used());
  pool_.run(batch.n_tokens, [&](int share, int begin, int end) {
    float* h_D = w.row(share, 0);
    for (int t = begin; t < end; ++t) {
      kernels_.rms_norm(w.x_TD.get() + static_cast<std::size_t>(t) * d_model, weights.attn_norm, config_.norm_eps,
                        d_model, h_D);
      w.codes.write(kernels_, h_D, t);
    }
  });
  count_codes(batch, layer, LayerInput::kQkv);
  const LinearOutput qkv[] = {{&weights.q, w.q_TNH}, {&weights.k, w.k_TKH}, {&weights.v, w.v_TKH}};
  linear(kernels_, pool_, qkv, w.codes);
  if (config_.qkv_bias) add_biases(weights, batch.n_tokens);
  const AdaptedOutput adapted_qkv[] = {{&AdapterLayer::q, w.q_TNH, q_width},
                                       {&AdapterLayer::k, w.k_TKH, kv_width},
                                       {&AdapterLayer::v, w.v_TKH, kv_width}};
  adapters_.add(pool_, layer, adapted_qkv, w.codes.floats.get(), w.codes.ld, 0, batch.n_tokens);

  pool_.run(batch.n_tokens, [&](int, int begin, int end) {
    for (std::size_t t = begin; t < static_cast<std::size_t>(end); ++t) {
      const float* cos_H = w.cos_TH.get() + t * (d_head / 2);
      const float* sin_H = w.sin_TH.get() + t * (d_head / 2);
      float* q_NH = w.q_TNH + t * q_width;
      float* k_KH = w.k_TKH + t * kv_width;
      float* v_KH = w.v_TKH + t * kv_width;
      if (config_.qk_norm) {
        norm_heads(weights.q_norm, config_.n_heads, q_NH);
        norm_heads(weights.k_norm, n_kv_heads, k_KH);
      }
      kernels_.rope(q_NH, cos_H, sin_H, config_.n_heads, d_head);
      kernels_.rope(k_KH, cos_H, sin_H, n_kv_heads, d_head);
      const std::int32_t* table = batch.block_tables + static_cast<std::size_t>(w.seq_T.get()[t]) * batch.table_width;
      const int block = table[batch.positions[t] / kBlockTokens];
      const int slot = batch.positions[t] % kBlockTokens;
      for (int head = 0; head < n_kv_heads; ++head) {
        cache.store(kernels_, layer, block, head, slot, k_KH + head * d_head, v_KH + head * d_head);
      }
    }
  });
  attention_.run(pool_, batch, cache, layer, w.q_TNH);

  w.codes.resize(weights.o, batch.n_tokens, config_.o_activations, adapters_.are_used());
  pool_.run(batch.n_tokens, [&](int share, int begin, int end) {
    for (int t = begin; t < end; ++t) {
      float* a_NH = w.q_TNH + static_cast<std::size_t>(t) * q_width;
      if (config_.sub_norm) {
        kernels_.rms_norm(a_NH, weights.attn_sub_norm, config_.norm_eps, q_width, w.row(share, 0));
        a_NH = w.row(share, 0);
      }
      if (config_.hadamard) hadamard(a_NH, q_width);
      w.codes.write(kernels_, a_NH, t);
    }
  });
  count_codes(batch, layer, LayerInput::kO);
  const LinearOutput o[] = {{&weights.o, w.y_TD}};
  linear(kernels_, pool_, o, w.codes);
  const AdaptedOutput adapted_o[] = {{&AdapterLayer::o, w.y_TD, d_model}};
  adapters_.add(pool_, layer, adapted_o, w.codes.floats.get(), w.codes.ld, 0, batch.n_tokens);
  add_residual(0, batch.n_tokens);
}

void Model::add_biases(const LayerWeights& layer, int n_tokens) {
  Workspace& w = *workspace_;
  const int q_width = config_.n_heads * config_.d_head;
  const int kv_width = config_.n_kv_heads * config_.d_head;
  pool_.run(n_tokens, [&](int, int begin, int end) {
    for (std::size_t t = begin; t < static_cast<std::size_t>(end); ++t) {
      kernels_.add(layer.q_bias, q_width, w.q_TNH + t * q_width);
      kernels_.add(layer.k_bias, kv_width, w.k_TKH + t * kv_width);
      kernels_.add(layer.v_bias, kv_width, w.v_TKH + t * kv_width);
    }
  });
}

void Model::norm_heads(const float* gain, int n_heads, float* x) const noexcept {
  const int d_head = config_.d_head;
  for (int head = 0; head < n_heads; ++head, x += d_head) {
    kernels_.rms_norm(x, gain, config_.norm_eps, d_head, x);
  }
}

void Model::feed_forward(const Batch& batch, int index, int first, int n_tokens) {
  Workspace& w = *workspace_;
  const LayerWeights& layer = weights_.layers[index];
  const int d_model = config_.d_model;
  const int d_ff = config_.d_ff;

  w.codes.resize(layer.gate, n_tokens, config_.activations, adapters_.are_used());
  pool_.run(n_tokens, [&](int share, int begin, int end) {
    float* h_D = w.row(share, 0);
    for (int t = begin; t < end; ++t) {
      kernels_.rms_norm(w.x_TD.get() + static_cast<std::size_t>(first + t) * d_model, layer.ffn_norm, config_.norm_eps,
                        d_model, h_D);
      w.codes.write(kernels_, h_D, t);
    }
  });
  count_codes(batch, index, LayerInput::kGateUp);
  const LinearOutput gate_up[] = {{&layer.gate, w.gate_TF}, {&layer.up, w.up_TF}};
  linear(kernels_, pool_, gate_up, w.codes);
  const AdaptedOutput adapted_gate_up[] = {{&AdapterLayer::gate, w.gate_TF, d_ff}, {&AdapterLayer::up, w.up_TF, d_ff}};
  adapters_.add(pool_, index, adapted_gate_up, w.codes.floats.get(), w.codes.ld, first, n_tokens);

  const auto activate = config_.activation == FfnActivation::kSilu ? kernels_.silu_mul : kernels_.relu2_mul;
  w.codes.resize(layer.down, n_tokens, config_.down_activations, adapters_.are_used());
  pool_.run(n_tokens, [&](int share, int begin, int end) {
    for (std::size_t t = begin; t < static_cast<std::size_t>(end); ++t) {
      float* f_F = w.row(share, 0);
      activate(w.gate_TF + t * d_ff, w.up_TF + t * d_ff, d_ff, f_F);
      if (config_.sub_norm) {
        kernels_.rms_norm(f_F, layer.ffn_sub_norm, config_.norm_eps, d_ff, w.row(share, 1));
        f_F = w.row(share, 1);
      }
      if (config_.hadamard) hadamard(f_F, d_ff);
      w.codes.write(kernels_, f_F, static_cast<int>(t));
    }
  });
  count_codes(batch, index, LayerInput::kDown);
  const LinearOutput down[] = {{&layer.down, w.y_TD}};
  linear(kernels_, pool_, down, w.codes);
  const AdaptedOutput adapted_down[] = {{&AdapterLayer::down, w.y_TD, d_model}};
  adapters_.add(pool_, index, adapted_down, w.codes.floats.get(), w.codes.ld, first, n_tokens);
  add_residual(first, n_tokens);
}

// Adds what the rows of codes hold. Shares count for themselves, and are added in the end.
void Model::count_codes(const Batch& batch, int layer, LayerInput input) {
  if (!batch.code_counts) return;
  const QuantizedRows& codes = workspace_->codes;
  CodeCounts& total = batch.code_counts[layer * kLayerInputs + static_cast<int>(input)];
  pool_.run(codes.n_rows, [&](int, int begin, int end) {
    CodeCounts own{};
    for (int row = begin; row < end; ++row) {
      const CodeCounts counts = codes.count(row);
      own.saturated += counts.saturated;
      own.zero += counts.zero;
    }
    std::atomic_ref(total.saturated).fetch_add(own.saturated, std::memory_order_relaxed);
    std::atomic_ref(total.zero).fetch_add(own.zero, std::memory_order_relaxed);
  });
}

void Model::norm_rows(const Batch& batch, float* h_RD) {
  const int d_model = config_.d_model;
  pool_.run(batch.n_rows, [&](int, int begin, int end) {
    for (std::size_t r = begin; r < static_cast<std::size_t>(end); ++r) {
      const float* x_D = workspace_->x_TD.get() + static_cast<std::size_t>(batch.rows[r]) * d_model;
      kernels_.rms_norm(x_D, weights_.norm, config_.norm_eps, d_model, h_RD + r * d_model);
    }
  });
}

void Model::add_residual(int first, int n_tokens) {
  Workspace& w = *workspace_;
  float* x_TD = w.x_TD.get() + static_cast<std::size_t>(first) * config_.d_model;
  pool_.run(n_tokens, [&](int, int begin, int end) {
    for (std::size_t t = begin; t < static_cast<std::size_t>(end); ++t) {
      kernels_.add(w.y_TD + t * config_.d_model, config_.d_model, x_TD + t * config_.d_model);
    }
  });
}

// Byte 4 * (row % 16) + k % 4 of unit k / 4 of the row's tile holds its code.
void embed_row(const PackedMatrix& matrix, int row, float* x) noexcept {
  constexpr int kLanes = 16;
  const int rows = tile_rows(matrix.encoding);
  const std::size_t tile_bytes = static_cast<std::size_t>(pad_inputs(matrix.k)) * kLanes;
  const std::uint8_t* lane = matrix.data + row / rows * tile_bytes + 4 * (row % kLanes);
  float code[256];
  for (int byte = 0; byte < 256; ++byte) {
    code[byte] = static_cast<float>(code_of(matrix.encoding, byte, row % rows / kLanes));
  }
  const int group = matrix.group ? matrix.group : matrix.k;
  const float* scale = matrix.scale;
  if (matrix.scale_per_row) scale += static_cast<std::size_t>(row) * (matrix.k / group);
  for (int begin = 0; begin < matrix.k; begin += group, ++scale) {
    for (int k = begin; k < begin + group; ++k) {
      x[k] = code[lane[static_cast<std::size_t>(k / 4) * 64 + k % 4]] * *scale;
    }
  }
}

void embed_row(const std::uint16_t* row, int n, float* x) noexcept {
  for (int i = 0; i < n; ++i) x[i] = std::bit_cast<float>(std::uint32_t{row[i]} << 16);
}

}  // namespace onebit
