// The forward pass: a ragged batch of tokens in, logits of the rows asked for out.
//
// A model borrows its weights and never changes them. It trusts its arguments: bindings/ checks all that comes from
// outside. Mirrors nn/transformer.py name by name.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "onebit/adapter.h"
#include "onebit/attention.h"
#include "onebit/buffer.h"
#include "onebit/head.h"
#include "onebit/kernels.h"
#include "onebit/kv_cache.h"
#include "onebit/threads.h"
#include "onebit/types.h"

namespace onebit {

enum class FfnActivation { kSilu, kRelu2 };

struct ModelConfig {
  int vocab_size;
  int d_model;
  int n_layers;
  int n_heads;
  int n_kv_heads;
  int d_head;
  int d_ff;
  int max_seq_len;
  double rope_attention_factor;
  float norm_eps;
  FfnActivation activation;
  Activations activations;  // of q, k, v, gate and up
  Activations o_activations;
  Activations down_activations;
  bool hadamard;  // rotates the inputs of o and down, whose widths are powers of two
  bool sub_norm;
  bool qk_norm;
  bool qkv_bias;
};

// Gains are float32 of the width they normalise, and biases of the width of their output; sub-norms, norms of q and k (of
// one head) and biases are null where the config has none.
struct LayerWeights {
  const float* attn_norm;
  const float* attn_sub_norm;
  const float* q_norm;
  const float* k_norm;
  PackedMatrix q, k, v, o;
  const float* q_bias;
  const float* k_bias;
  const float* v_bias;
  const float* ffn_norm;
  const float* ffn_sub_norm;
  PackedMatrix gate, up, down;
};

// Linear layers are T80, R64 or B128, or all of them dense, with activations kNone. Embedding and head (the same where
// tied) are Q8 with one scale per row, bfloat16, or codes of the same kinds as the layers'.
struct ModelWeights {
  PackedMatrix embed;                         // unused with embed_bf16
  const std::uint16_t* embed_bf16 = nullptr;  // [vocab_size, pad_inputs(d_model)]
  std::vector<LayerWeights> layers;
  const float* norm;
  HeadWeights head;
  std::vector<float> inv_freq;  // [d_head / 2]
};

class Model {
 public:
  Model(const ModelConfig& config, ModelWeights weights, const Kernels& kernels, int n_threads,
        std::vector<Adapter> adapters = {});
  ~Model();

  const ModelConfig& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  int n_threads() const { return pool_.size(); }
  int n_adapters() const { return adapters_.size(); }

  // logits: float32 [n_rows, vocab_size]; see Head::forward. Callers on several threads take turns. Throws std::bad_alloc.
  void forward(const Batch& batch, KvCache& cache, float* logits);
  // hidden: float32 [n_rows, d_model], what the head multiplies: the last layer's output after the final norm.
  void forward_hidden(const Batch& batch, KvCache& cache, float* hidden);

 private:
  struct Workspace;

  void run_layers(const Batch& batch, KvCache& cache);
  void reserve(const Batch& batch);
  void embed(const Batch& batch);
  void attention(const Batch& batch, KvCache& cache, int layer);
  void add_biases(const LayerWeights& layer, int n_tokens);
  void norm_heads(const float* gain, int n_heads, float* x) const noexcept;
  void feed_forward(const Batch& batch, int layer, int first, int n_tokens);
  void norm_rows(const Batch& batch, float* h_RD);
  void count_codes(const Batch& batch, int layer, LayerInput input);
  void add_residual(int first, int n_tokens);

  ModelConfig config_;
  ModelWeights weights_;
  std::vector<Buffer<std::uint8_t>> repacked_;  // weights that these kernels want in another layout
  const Kernels& kernels_;
  ThreadPool pool_;
  Adapters adapters_;
  Attention attention_;
  Head head_;
  std::mutex mutex_;
  std::unique_ptr<Workspace> workspace_;
};

// One row of a packed matrix as float32(code) * scale.
void embed_row(const PackedMatrix& matrix, int row, float* x) noexcept;
// A row of bfloat16 as it is.
void embed_row(const std::uint16_t* row, int n, float* x) noexcept;

}  // namespace onebit
