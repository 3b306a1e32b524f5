// A whole model gives the same logits with every table, on every architecture. Kinds: invariant, golden.
//
// The hashes were printed by the scalar table on x86-64. They change with the definition of the numbers, and with
// nothing else: set them to what a failing check prints.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "onebit/kernels.h"
#include "onebit/model.h"
#include "random.h"

namespace {

using namespace onebit;

constexpr int kVocab = 97;
constexpr int kLayers = 2;
constexpr int kKvHeads = 2;
constexpr int kBlocks = 5;

enum class HeadKind { kQ8, kBf16, kCodes };

struct Case {
  Encoding encoding;
  FfnActivation activation;
  Activations activations;
  bool sub_norm;
  HeadKind head;
  KvFormat cache;
  bool norms_and_biases;
  int group;  // inputs that share a scale, or 0
  std::uint64_t hash;
  bool a4_8 = false;  // o and down differ from the others
  bool hadamard = false;

  // Widths that need padding, or hold whole groups, or are powers of two.
  int d_model() const { return group ? 96 : 72; }
  int d_ff() const { return hadamard ? 128 : group ? 192 : 200; }
  int n_heads() const { return hadamard ? 4 : 6; }
  int d_head() const { return hadamard ? 16 : 24; }
};

constexpr Case kCases[] = {
    {Encoding::kT80, FfnActivation::kSilu, Activations::kA8, false, HeadKind::kQ8, KvFormat::kBf16, false, 0,
     0x4d85ce8574b00499},
    {Encoding::kR64, FfnActivation::kRelu2, Activations::kA8, true, HeadKind::kQ8, KvFormat::kBf16, false, 0,
     0x45f005ea422d06d6},
    {Encoding::kB128, FfnActivation::kSilu, Activations::kA4, true, HeadKind::kBf16, KvFormat::kBf16, false, 0,
     0xbb26c1fd0a4ac7af},
    {Encoding::kT80, FfnActivation::kRelu2, Activations::kA1, false, HeadKind::kBf16, KvFormat::kBf16, false, 0,
     0x9046f4cf54bd03eb},
    {Encoding::kT80, FfnActivation::kRelu2, Activations::kA8, true, HeadKind::kQ8, KvFormat::kInt8, true, 0,
     0x4b8f7f80f8733873},
    {Encoding::kR64, FfnActivation::kSilu, Activations::kA8, false, HeadKind::kQ8, KvFormat::kFp8, true, 0,
     0xfedd1640524e6f12},
    // Dense: no encoding is used.
    {Encoding::kQ8, FfnActivation::kSilu, Activations::kNone, false, HeadKind::kBf16, KvFormat::kInt8, false, 0,
     0x10caf02565edc9ec},
    // 15 bits of activations; groups; embedding and head as codes.
    {Encoding::kT80, FfnActivation::kSilu, Activations::kA15, false, HeadKind::kCodes, KvFormat::kBf16, false, 0,
     0xb6d7b9d179b4f7c4},
    {Encoding::kB128, FfnActivation::kSilu, Activations::kA15, false, HeadKind::kCodes, KvFormat::kInt8, true, 48,
     0xc2cf5c4f156b565a},
    {Encoding::kR64, FfnActivation::kRelu2, Activations::kA15, true, HeadKind::kBf16, KvFormat::kBf16, false, 48,
     0xc71146914ad6210b},
    // Inputs that differ by layer, and rotated ones.
    {Encoding::kT80, FfnActivation::kRelu2, Activations::kA4, true, HeadKind::kQ8, KvFormat::kBf16, false, 0,
     0x17266635a1b94cc8, true},
    {Encoding::kB128, FfnActivation::kSilu, Activations::kA4, false, HeadKind::kBf16, KvFormat::kInt8, true, 48,
     0xc5aa1df0cb255d20, true},
    {Encoding::kR64, FfnActivation::kRelu2, Activations::kA4, true, HeadKind::kQ8, KvFormat::kBf16, false, 0,
     0x27c1bb18b1c64f59, false, true},
    {Encoding::kT80, FfnActivation::kSilu, Activations::kA4, false, HeadKind::kQ8, KvFormat::kFp8, false, 0,
     0xc1511997bbbfa38b, true, true},
};

// A model of random bytes, which mean the same everywhere, and the memory that it borrows.
class RandomModel {
 public:
  explicit RandomModel(const Case& what) : case_(what) {
    const int d_model = what.d_model();
    const int d_ff = what.d_ff();
    for (int layer = 0; layer < kLayers; ++layer) {
      const int width = what.n_heads() * what.d_head();
      const int kv_width = kKvHeads * what.d_head();
      weights_.layers.push_back({.attn_norm = gains(d_model),
                                 .attn_sub_norm = what.sub_norm ? gains(width) : nullptr,
                                 .q_norm = what.norms_and_biases ? gains(what.d_head()) : nullptr,
                                 .k_norm = what.norms_and_biases ? gains(what.d_head()) : nullptr,
                                 .q = linear(width, d_model),
                                 .k = linear(kv_width, d_model),
                                 .v = linear(kv_width, d_model),
                                 .o = linear(d_model, width),
                                 .q_bias = what.norms_and_biases ? gains(width) : nullptr,
                                 .k_bias = what.norms_and_biases ? gains(kv_width) : nullptr,
                                 .v_bias = what.norms_and_biases ? gains(kv_width) : nullptr,
                                 .ffn_norm = gains(d_model),
                                 .ffn_sub_norm = what.sub_norm ? gains(d_ff) : nullptr,
                                 .gate = linear(d_ff, d_model),
                                 .up = linear(d_ff, d_model),
                                 .down = linear(d_model, d_ff)});
    }
    const Encoding rows = what.head == HeadKind::kCodes ? what.encoding : Encoding::kQ8;
    weights_.embed = matrix(rows, kVocab, d_model);
    weights_.norm = gains(d_model);
    weights_.head.rows = matrix(rows, kVocab, d_model);
    if (what.head == HeadKind::kBf16) {
      weights_.head.bf16 = halves_.emplace_back(random_.halves(kVocab * pad_inputs(d_model))).data();
      weights_.head.bounds = gains(2 * kVocab);
    }
    for (int i = 0; i < what.d_head() / 2; ++i) weights_.inv_freq.push_back(1.0f / static_cast<float>(1 + i * i));
    // Drawn last, so that models without adapters stay as they were.
    adapters_ = {adapter(5, 1, 2, true), adapter(17, 3, 1, false)};
  }

  // Three sequences at once, then more of two of them; all logits of both steps.
  std::vector<float> logits(const Kernels& kernels, int n_threads, bool is_adapted) const {
    const ModelConfig config = {.vocab_size = kVocab,
                                .d_model = case_.d_model(),
                                .n_layers = kLayers,
                                .n_heads = case_.n_heads(),
                                .n_kv_heads = kKvHeads,
                                .d_head = case_.d_head(),
                                .d_ff = case_.d_ff(),
                                .max_seq_len = 128,
                                .rope_attention_factor = 1.0,
                                .norm_eps = 1e-5f,
                                .activation = case_.activation,
                                .activations = case_.activations,
                                .o_activations = case_.a4_8 ? Activations::kA8Half : case_.activations,
                                .down_activations = case_.a4_8 ? Activations::kA8 : case_.activations,
                                .hadamard = case_.hadamard,
                                .sub_norm = case_.sub_norm,
                                .qk_norm = case_.norms_and_biases,
                                .qkv_bias = case_.norms_and_biases};
    Model model(config, weights_, kernels, n_threads, is_adapted ? adapters_ : std::vector<Adapter>{});
    KvCache cache(case_.cache, kLayers, kKvHeads, case_.d_head(), kBlocks);
    std::vector<float> all;
    step(model, cache, {{0, 70}, {0, 1}, {0, 9}}, is_adapted, all);
    step(model, cache, {{70, 3}, {1, 1}, {9, 0}}, is_adapted, all);
    return all;
  }

 private:
  struct Piece {
    int position, length;
  };

  static void step(Model& model, KvCache& cache, const std::vector<Piece>& pieces, bool is_adapted,
                   std::vector<float>& all) {
    // The second sequence has none.
    constexpr std::int32_t kAdapters[] = {1, -1, 0};
    // Blocks out of order.
    constexpr std::int32_t kTables[] = {3, 1, 0, 0, 4, 2};
    std::vector<std::int32_t> tokens, positions, rows, starts = {0};
    for (const Piece& piece : pieces) {
      for (int i = 0; i < piece.length; ++i) {
        rows.push_back(static_cast<std::int32_t>(tokens.size()));
        tokens.push_back((17 * piece.position + 31 * i + static_cast<int>(starts.size())) % kVocab);
        positions.push_back(piece.position + i);
      }
      starts.push_back(static_cast<std::int32_t>(tokens.size()));
    }
    const int n = static_cast<int>(tokens.size());
    const Batch batch = {.tokens = tokens.data(),
                         .positions = positions.data(),
                         .seq_starts = starts.data(),
                         .block_tables = kTables,
                         .rows = rows.data(),
                         .top_k = nullptr,
                         .n_tokens = n,
                         .n_seqs = static_cast<int>(pieces.size()),
                         .table_width = 2,
                         .n_rows = n,
                         .adapters = is_adapted ? kAdapters : nullptr};
    const std::size_t before = all.size();
    all.resize(before + static_cast<std::size_t>(n) * kVocab);
    model.forward(batch, cache, all.data() + before);
  }

  // A and B of so many planes, for all layers or some.
  Adapter adapter(int rank, int a_planes, int b_planes, bool is_whole) {
    const int q_width = case_.n_heads() * case_.d_head();
    const int kv_width = kKvHeads * case_.d_head();
    const auto planes = [&](int n_planes, int n, int k) {
      std::vector<std::uint16_t>& data = halves_.emplace_back(random_.halves(n_planes * n * pad_inputs(k)));
      return Planes{data.data(), n_planes, n, k};
    };
    const auto low = [&](int n, int k) {
      return LowRank{planes(a_planes, rank, k), planes(b_planes, n, rank), 1.0f / 4096};
    };
    Adapter layers(kLayers);
    for (AdapterLayer& layer : layers) {
      layer.q = low(q_width, case_.d_model());
      layer.down = low(case_.d_model(), case_.d_ff());
      if (!is_whole) continue;
      layer.k = low(kv_width, case_.d_model());
      layer.v = low(kv_width, case_.d_model());
      layer.o = low(case_.d_model(), q_width);
      layer.gate = low(case_.d_ff(), case_.d_model());
      layer.up = low(case_.d_ff(), case_.d_model());
    }
    return layers;
  }

  PackedMatrix linear(int n, int k) {
    if (case_.activations != Activations::kNone) return matrix(case_.encoding, n, k);
    std::vector<std::uint16_t>& rows = halves_.emplace_back(random_.halves(n * pad_inputs(k)));
    PackedMatrix dense{};
    dense.n = n;
    dense.k = k;
    dense.bf16 = rows.data();
    return dense;
  }

  PackedMatrix matrix(Encoding encoding, int n, int k) {
    const int tiles = (n + tile_rows(encoding) - 1) / tile_rows(encoding);
    const std::uint8_t* data =
        bytes_.emplace_back(random_.bytes(static_cast<std::size_t>(tiles) * pad_inputs(k) * 16)).data();
    const bool is_q8 = encoding == Encoding::kQ8;
    const int group = is_q8 ? 0 : case_.group;
    const bool per_row = is_q8 || group > 0;
    return {encoding, n, k, data, gains(per_row ? (group ? n * (k / group) : n) : 1), per_row, group};
  }

  // Multipliers about one eighth: norms keep the values in bounds.
  const float* gains(int n) {
    std::vector<float>& x = floats_.emplace_back(random_.values(n));
    for (float& v : x) v = 0.125f + v * 0.03125f;
    return x.data();
  }

  Case case_;
  Random random_;
  std::vector<std::vector<std::uint8_t>> bytes_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<std::uint16_t>> halves_;
  ModelWeights weights_;
  std::vector<Adapter> adapters_;
};

// FNV-1a of the bits, value by value.
std::uint64_t hash_of(const std::vector<float>& x) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const float value : x) hash = (hash ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3;
  return hash;
}

}  // namespace

void test_same_bits() {
  const Kernels* tables[16];
  const int n = available_kernels(tables, 16);
  for (const Case& what : kCases) {
    const RandomModel model(what);
    for (int i = 0; i < n; ++i) {
      const std::vector<float> logits = model.logits(*tables[i], 1 + i % 2, false);
      bool is_finite = true;
      for (const float value : logits) is_finite = is_finite && std::isfinite(value);
      CHECK(is_finite);
      const std::uint64_t hash = hash_of(logits);
      CHECK(hash == what.hash);
      if (hash != what.hash) {
        std::fprintf(stderr, "case %d, %s: 0x%016llx\n", static_cast<int>(&what - kCases), tables[i]->name,
                     static_cast<unsigned long long>(hash));
      }
    }
    // With adapters all tables give what the last, the scalar one, gives.
    const std::uint64_t adapted = hash_of(model.logits(*tables[n - 1], 1, true));
    CHECK(adapted != what.hash);
    for (int i = 0; i < n; ++i) CHECK(hash_of(model.logits(*tables[i], 1 + i % 3, true)) == adapted);
  }
}
