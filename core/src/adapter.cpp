#include "onebit/adapter.h"

#include <algorithm>
#include <utility>

namespace onebit {
namespace {

// Rows of A and of B that a thread takes at a time: a single token is shared by all of them.
constexpr int kDownRows = 8;
constexpr int kUpRows = 128;

int n_blocks(int n, int rows) { return (n + rows - 1) / rows; }

// out[i] = dot(row first + i, x) for n rows, at most kUpRows.
void dots(const Kernels& kernels, const Planes& w, const float* x, int first, int n, float* out) {
  float part[kUpRows];
  const std::ptrdiff_t ld = pad_inputs(w.k);
  for (int plane = 0; plane < w.n_planes; ++plane) {
    const std::uint16_t* rows = w.data + (static_cast<std::ptrdiff_t>(plane) * w.n + first) * ld;
    kernels.dot_bf16(rows, ld, n, x, 0, 1, w.k, plane == 0 ? out : part, 0);
    for (int i = 0; plane > 0 && i < n; ++i) out[i] += part[i];
  }
}

}  // namespace

Adapters::Adapters(std::vector<Adapter> adapters, const Kernels& kernels)
    : adapters_(std::move(adapters)), kernels_(kernels) {
  for (const Adapter& adapter : adapters_) {
    for (const AdapterLayer& layer : adapter) {
      for (const LowRank* low : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
        max_rank_ = std::max(max_rank_, low->a.n);
      }
    }
  }
}

void Adapters::begin(const Batch& batch) {
  tokens_.clear();
  for (int seq = 0; batch.adapters && seq < batch.n_seqs; ++seq) {
    for (int t = batch.seq_starts[seq]; batch.adapters[seq] >= 0 && t < batch.seq_starts[seq + 1]; ++t) {
      tokens_.push_back({t, batch.adapters[seq]});
    }
  }
}

void Adapters::add(ThreadPool& pool, int layer, std::span<const AdaptedOutput> outputs, const float* x,
                   std::ptrdiff_t ldx, int first, int n_tokens) {
  const auto is_before = [](const Token& token, int at) { return token.at < at; };
  const auto begin = std::lower_bound(tokens_.begin(), tokens_.end(), first, is_before);
  const auto end = std::lower_bound(begin, tokens_.end(), first + n_tokens, is_before);
  const std::span<const Token> tokens(begin, end);
  if (tokens.empty()) return;

  const int n_outputs = static_cast<int>(outputs.size());
  const std::ptrdiff_t ldh = pad_inputs(max_rank_);
  h_.reserve(tokens.size() * n_outputs * ldh);
  int widest = 0;
  for (const AdaptedOutput& output : outputs) widest = std::max(widest, output.n);
  const int n_tasks = static_cast<int>(tokens.size()) * n_outputs;

  // A task is an output of a token; its rows are cut into blocks.
  const auto run = [&](int blocks, auto&& of_block) {
    pool.run(n_tasks * blocks, [&](int, int from, int to) {
      for (int item = from; item < to; ++item) {
        const int task = item / blocks;
        const Token& token = tokens[task / n_outputs];
        const AdaptedOutput& output = outputs[task % n_outputs];
        const LowRank& low = adapters_[token.adapter][layer].*output.matrix;
        if (low.a.data) of_block(low, output, token.at - first, h_.get() + task * ldh, item % blocks);
      }
    });
  };
  run(n_blocks(max_rank_, kDownRows),
      [&](const LowRank& low, const AdaptedOutput&, std::ptrdiff_t t, float* h, int block) {
        const int row = block * kDownRows;
        if (row < low.a.n) dots(kernels_, low.a, x + t * ldx, row, std::min(kDownRows, low.a.n - row), h + row);
      });
  run(n_blocks(widest, kUpRows),
      [&](const LowRank& low, const AdaptedOutput& output, std::ptrdiff_t t, const float* h, int block) {
        const int row = block * kUpRows;
        const int n = std::min(kUpRows, output.n - row);
        if (n <= 0) return;
        float sums[kUpRows];
        dots(kernels_, low.b, h, row, n, sums);
        float* y = output.y + t * output.n + row;
        for (int i = 0; i < n; ++i) y[i] += sums[i] * low.scale;
      });
}

}  // namespace onebit
