// The Python face of the core: checks everything that comes from outside, then calls code that trusts its arguments.
// Arrays are borrowed without a copy and kept alive; what does not fit raises ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "onebit/adapter.h"
#include "onebit/kernels.h"
#include "onebit/kv_cache.h"
#include "onebit/model.h"
#include "onebit/rope.h"
#include "onebit/sampling.h"
#include "onebit/types.h"

namespace nb = nanobind;
using namespace nb::literals;
using onebit::PackedMatrix;

void bind_kernels(nb::module_& m);

namespace {

constexpr int kMaxKernels = 16;

// 127 * 127 * inputs must fit an int32 sum.
constexpr std::int64_t kMaxInputs = 1 << 17;
constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxRank = 1 << 14;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw nb::value_error(message.str().c_str());
}

// Raises ValueError with the parts of a message, which cost nothing while the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// A contiguous array of T with the shape it came with.
template <class T>
struct Array {
  nb::ndarray<nb::ro, nb::device::cpu> owner;
  const T* data;

  std::int64_t size(int axis) const { return static_cast<std::int64_t>(owner.shape(axis)); }
  int ndim() const { return static_cast<int>(owner.ndim()); }
};

template <class T>
constexpr const char* kTypeName = nullptr;
template <>
constexpr const char* kTypeName<float> = "float32";
template <>
constexpr const char* kTypeName<std::int32_t> = "int32";
template <>
constexpr const char* kTypeName<std::uint8_t> = "uint8";
template <>
constexpr const char* kTypeName<std::uint16_t> = "uint16";

// Of any rank where ndim is 0.
template <class T>
Array<T> array(nb::handle value, std::string_view name, std::size_t ndim) {
  nb::ndarray<nb::ro, nb::device::cpu> a;
  bool fits = nb::ndarray_check(value) && nb::try_cast(value, a) && a.dtype() == nb::dtype<T>();
  fits = fits && (ndim == 0 || a.ndim() == ndim);
  std::int64_t stride = 1;
  for (std::size_t axis = fits ? a.ndim() : 0; axis-- > 0;) {
    fits = fits && (a.shape(axis) == 1 || a.size() == 0 || a.stride(axis) == stride);
    stride *= static_cast<std::int64_t>(a.shape(axis));
  }
  if (!fits && ndim != 0) fail(name, ": expected a contiguous ", kTypeName<T>, " array of ", ndim, " dimensions");
  require(fits, name, ": expected a contiguous ", kTypeName<T>, " array");
  const T* data = static_cast<const T*>(a.data());
  require(reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0, name, ": the array is not aligned");
  return {std::move(a), data};
}

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

// A PackedMatrix together with the arrays it borrows.
struct PackedArrays {
  PackedMatrix matrix;
  nb::ndarray<nb::ro, nb::device::cpu> data;
  nb::ndarray<nb::ro, nb::device::cpu> scale;
};

PackedArrays make_packed(const std::string& encoding, std::int64_t n, std::int64_t k, nb::handle data,
                         nb::handle scale) {
  int index = 0;
  while (index < onebit::kEncodings && encoding != onebit::kEncodingNames[index]) ++index;
  require(index < onebit::kEncodings, "encoding ", encoding, ": expected t80, r64, b128, q8 or q4");
  require(n >= 1 && k >= 1 && n < (1 << 30) && k <= kMaxInputs, "packed matrix ", shape_text({n, k}),
          ": expected at most 2^30 rows of at most ", kMaxInputs, " inputs");
  const auto kind = static_cast<onebit::Encoding>(index);
  const int rows = onebit::tile_rows(kind);
  const std::int64_t tiles = (n + rows - 1) / rows;
  const std::int64_t units = onebit::pad_inputs(static_cast<int>(k)) / 4;
  auto units_u8 = array<std::uint8_t>(data, "packed data", 3);
  require(units_u8.size(0) == tiles && units_u8.size(1) == units && units_u8.size(2) == 64, "packed data: expected ",
          shape_text({tiles, units, 64}), " for ", encoding, " ", shape_text({n, k}), ", not ",
          shape_text({units_u8.size(0), units_u8.size(1), units_u8.size(2)}));

  auto scale_f32 = array<float>(scale, "scale", 0);
  const int ndim = scale_f32.ndim();
  const bool per_tensor = ndim == 1 && scale_f32.size(0) == 1;
  const bool per_row = ndim == 1 && scale_f32.size(0) == n;
  const bool per_group = ndim == 2 && scale_f32.size(0) == n && scale_f32.size(1) >= 1 && k % scale_f32.size(1) == 0;
  require(per_tensor || per_row || per_group, "scale: expected [1], [", n, "] or [", n,
          ", groups], where groups divides ", k);
  const int group = per_group && scale_f32.size(1) > 1 ? static_cast<int>(k / scale_f32.size(1)) : 0;
  require(group % onebit::kInputAlign == 0, "scale: a group of ", group, " inputs is no multiple of 16");
  const PackedMatrix matrix{
      kind, static_cast<int>(n), static_cast<int>(k), units_u8.data, scale_f32.data, per_row || per_group, group};
  return {matrix, std::move(units_u8.owner), std::move(scale_f32.owner)};
}

// The weights of a checkpoint by canonical name, and the arrays to keep alive.
class Tensors {
 public:
  explicit Tensors(nb::dict tensors) : tensors_(std::move(tensors)) {}

  const float* gain(const std::string& name, int n) {
    auto values = array<float>(find(name), name, 1);
    require(values.size(0) == n, name, ": expected ", n, " values, not ", values.size(0));
    owners_.push_back(std::move(values.owner));
    return values.data;
  }

  bool is_packed(const std::string& name) const { return nb::isinstance<PackedArrays>(find(name)); }

  const std::uint16_t* bf16(const std::string& name, int n, int k) {
    auto values = array<std::uint16_t>(find(name), name, 2);
    require(values.size(0) >= n && values.size(1) == onebit::pad_inputs(k), name, ": expected at least ",
            shape_text({n, onebit::pad_inputs(k)}), " values, not ", shape_text({values.size(0), values.size(1)}));
    owners_.push_back(std::move(values.owner));
    return values.data;
  }

  const float* table(const std::string& name, int n, int k) {
    auto values = array<float>(find(name), name, 2);
    require(values.size(0) == n && values.size(1) == k, name, ": expected ", shape_text({n, k}), " values");
    owners_.push_back(std::move(values.owner));
    return values.data;
  }

  PackedMatrix dense(const std::string& name, std::int64_t n, std::int64_t k) {
    require(n < (1 << 30) && k <= kMaxInputs, name, ": expected at most 2^30 rows of at most ", kMaxInputs, " inputs");
    PackedMatrix matrix{};
    matrix.n = static_cast<int>(n);
    matrix.k = static_cast<int>(k);
    matrix.bf16 = bf16(name, matrix.n, matrix.k);
    return matrix;
  }

  // codes: t80, r64 or b128 are expected; q8: 8-bit rows are.
  PackedMatrix matrix(const std::string& name, std::int64_t n, std::int64_t k, bool codes, bool q8) {
    const nb::handle value = find(name);
    require(nb::isinstance<PackedArrays>(value), name, ": expected a PackedMatrix");
    const auto& packed = nb::cast<const PackedArrays&>(value);
    const PackedMatrix& matrix = packed.matrix;
    require(matrix.n == n && matrix.k == k, name, ": expected shape ", shape_text({n, k}), ", not ",
            shape_text({matrix.n, matrix.k}));
    const bool is_q8 = matrix.encoding == onebit::Encoding::kQ8;
    const bool is_expected = is_q8 ? q8 : codes && matrix.encoding != onebit::Encoding::kQ4;
    const char* encoding = onebit::kEncodingNames[static_cast<int>(matrix.encoding)];
    require(is_expected, name, ": encoding ", encoding, "; expected ",
            (codes ? q8 ? "q8, t80, r64 or b128" : "t80, r64 or b128" : "q8"));
    require(!is_q8 || (matrix.scale_per_row && matrix.group == 0), name, ": expected one scale per row");
    owners_.push_back(packed.data);
    owners_.push_back(packed.scale);
    return matrix;
  }

  std::vector<nb::ndarray<nb::ro, nb::device::cpu>> take_owners() { return std::move(owners_); }

 private:
  nb::handle find(const std::string& name) const {
    require(tensors_.contains(name.c_str()), name, " is missing");
    return tensors_[name.c_str()];
  }

  nb::dict tensors_;
  std::vector<nb::ndarray<nb::ro, nb::device::cpu>> owners_;
};

int positive(nb::handle config, const char* name) {
  const auto value = nb::cast<std::int64_t>(config.attr(name));
  require(value > 0 && value < (1 << 24), "config: ", name, " is ", value);
  return static_cast<int>(value);
}

template <class Choice>
Choice choose(const std::string& value, const char* name,
              std::initializer_list<std::pair<const char*, Choice>> choices) {
  for (const auto& [text, choice] : choices) {
    if (value == text) return choice;
  }
  fail("config: ", name, " is ", value, ", which the core does not know");
}

// How the input of a linear layer is quantised.
onebit::Activations read_activations(nb::handle config, const char* layer) {
  using onebit::Activations;
  const auto value = nb::cast<std::string>(config.attr("input_quantizer")(layer));
  return choose<Activations>(value, "activations",
                             {{"a15", Activations::kA15},
                              {"a8", Activations::kA8},
                              {"a8-half", Activations::kA8Half},
                              {"a4", Activations::kA4},
                              {"a1", Activations::kA1},
                              {"none", Activations::kNone}});
}

onebit::ModelConfig read_config(nb::handle config) {
  using onebit::FfnActivation;
  return {
      .vocab_size = positive(config, "vocab_size"),
      .d_model = positive(config, "d_model"),
      .n_layers = positive(config, "n_layers"),
      .n_heads = positive(config, "n_heads"),
      .n_kv_heads = positive(config, "n_kv_heads"),
      .d_head = positive(config, "d_head"),
      .d_ff = positive(config, "d_ff"),
      .max_seq_len = positive(config, "max_seq_len"),
      .rope_attention_factor = nb::cast<double>(config.attr("rope_attention_factor")),
      .norm_eps = nb::cast<float>(config.attr("norm_eps")),
      .activation = choose<FfnActivation>(nb::cast<std::string>(config.attr("activation")), "activation",
                                          {{"silu", FfnActivation::kSilu}, {"relu2", FfnActivation::kRelu2}}),
      .activations = read_activations(config, "q"),
      .o_activations = read_activations(config, "o"),
      .down_activations = read_activations(config, "down"),
      .hadamard = nb::cast<bool>(config.attr("hadamard")),
      .sub_norm = nb::cast<bool>(config.attr("sub_norm")),
      .qk_norm = nb::cast<bool>(config.attr("qk_norm")),
      .qkv_bias = nb::cast<bool>(config.attr("qkv_bias")),
  };
}

void read_rows(const onebit::ModelConfig& config, bool tied_head, Tensors& tensors, onebit::ModelWeights& weights) {
  const auto packed = [&](const char* name, bool codes) {
    return tensors.matrix(name, config.vocab_size, config.d_model, codes, true);
  };
  const auto bf16 = [&](const char* name) { return tensors.bf16(name, config.vocab_size, config.d_model); };
  if (tensors.is_packed("embed.weight")) {
    weights.embed = packed("embed.weight", true);
  } else {
    weights.embed_bf16 = bf16("embed.weight");
  }
  const char* head = tied_head ? "embed.weight" : "head.weight";
  if (tensors.is_packed(head)) {
    weights.head.rows = packed(head, true);
  } else {
    weights.head.bf16 = bf16(head);
    weights.head.rows = packed("shortlist.weight", false);
    weights.head.bounds = tensors.table("shortlist.bounds", 2, config.vocab_size);
  }
}

onebit::ModelWeights read_weights(const onebit::ModelConfig& config, bool tied_head, Tensors& tensors) {
  const std::int64_t q_width = static_cast<std::int64_t>(config.n_heads) * config.d_head;
  const std::int64_t kv_width = static_cast<std::int64_t>(config.n_kv_heads) * config.d_head;
  onebit::ModelWeights weights;
  read_rows(config, tied_head, tensors, weights);
  weights.norm = tensors.gain("norm.weight", config.d_model);
  for (int i = 0; i < config.n_layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    const auto linear = [&](const char* name, std::int64_t n, std::int64_t k) {
      const std::string full = prefix + name + ".weight";
      // Dense activations go with dense weights, and with no others.
      if (config.activations == onebit::Activations::kNone) return tensors.dense(full, n, k);
      return tensors.matrix(full, n, k, true, false);
    };
    const auto gain = [&](const char* name, std::int64_t n) {
      return tensors.gain(prefix + name + ".weight", static_cast<int>(n));
    };
    onebit::LayerWeights layer{};
    layer.attn_norm = gain("attn_norm", config.d_model);
    layer.q = linear("q", q_width, config.d_model);
    layer.k = linear("k", kv_width, config.d_model);
    layer.v = linear("v", kv_width, config.d_model);
    layer.o = linear("o", config.d_model, q_width);
    layer.ffn_norm = gain("ffn_norm", config.d_model);
    layer.gate = linear("gate", config.d_ff, config.d_model);
    layer.up = linear("up", config.d_ff, config.d_model);
    layer.down = linear("down", config.d_model, config.d_ff);
    if (config.qkv_bias) {
      layer.q_bias = tensors.gain(prefix + "q.bias", static_cast<int>(q_width));
      layer.k_bias = tensors.gain(prefix + "k.bias", static_cast<int>(kv_width));
      layer.v_bias = tensors.gain(prefix + "v.bias", static_cast<int>(kv_width));
    }
    if (config.qk_norm) {
      layer.q_norm = gain("q_norm", config.d_head);
      layer.k_norm = gain("k_norm", config.d_head);
    }
    if (config.sub_norm) {
      layer.attn_sub_norm = gain("attn_sub_norm", q_width);
      layer.ffn_sub_norm = gain("ffn_sub_norm", config.d_ff);
    }
    require(layer.q.group == layer.k.group && layer.q.group == layer.v.group && layer.gate.group == layer.up.group,
            prefix, "*: matrices that share an input must share its scale groups");
    weights.layers.push_back(layer);
  }
  return weights;
}

// bfloat16 [n_planes, n, k padded], whose sum is a float32 matrix [n, k].
onebit::Planes read_planes(nb::handle value, const std::string& name, int n, int k,
                           std::vector<nb::ndarray<nb::ro, nb::device::cpu>>& owners) {
  auto planes = array<std::uint16_t>(value, name, 3);
  const std::int64_t width = onebit::pad_inputs(k);
  require(planes.size(0) >= 1 && planes.size(0) <= 3 && planes.size(1) == n && planes.size(2) == width, name,
          ": expected 1 to 3 planes of ", shape_text({n, width}), ", not ",
          shape_text({planes.size(0), planes.size(1), planes.size(2)}));
  owners.push_back(std::move(planes.owner));
  return {planes.data, static_cast<int>(owners.back().shape(0)), n, k};
}

// tensors: {"layers.0.q.weight": (planes of A, planes of B)}, of some linear layers or all.
onebit::Adapter read_adapter(const onebit::ModelConfig& config, nb::handle scale, nb::dict tensors,
                             std::vector<nb::ndarray<nb::ro, nb::device::cpu>>& owners) {
  using onebit::AdapterLayer;
  const int q_width = config.n_heads * config.d_head;
  const int kv_width = config.n_kv_heads * config.d_head;
  struct Target {
    const char* name;
    onebit::LowRank AdapterLayer::* matrix;
    int n;
    int k;
  };
  const Target targets[] = {{"q", &AdapterLayer::q, q_width, config.d_model},
                            {"k", &AdapterLayer::k, kv_width, config.d_model},
                            {"v", &AdapterLayer::v, kv_width, config.d_model},
                            {"o", &AdapterLayer::o, config.d_model, q_width},
                            {"gate", &AdapterLayer::gate, config.d_ff, config.d_model},
                            {"up", &AdapterLayer::up, config.d_ff, config.d_model},
                            {"down", &AdapterLayer::down, config.d_model, config.d_ff}};
  const auto factor = nb::cast<float>(scale);
  require(std::isfinite(factor), "adapter: the scale is not finite");
  onebit::Adapter adapter(static_cast<std::size_t>(config.n_layers));
  std::size_t n_found = 0;
  for (int i = 0; i < config.n_layers; ++i) {
    for (const Target& target : targets) {
      const std::string name = "layers." + std::to_string(i) + "." + target.name + ".weight";
      if (!tensors.contains(name.c_str())) continue;
      const nb::handle pair = tensors[name.c_str()];
      require(nb::isinstance<nb::tuple>(pair) && nb::len(pair) == 2, name, ": expected the planes of A and of B");
      const auto first = array<std::uint16_t>(pair[0], name, 3);
      const std::int64_t rank = first.size(1);
      require(rank >= 1 && rank <= kMaxRank, name, ": the rank is ", rank, "; expected 1 to ", kMaxRank);
      onebit::LowRank& low = adapter[static_cast<std::size_t>(i)].*target.matrix;
      low.a = read_planes(pair[0], name + ", A", static_cast<int>(rank), target.k, owners);
      low.b = read_planes(pair[1], name + ", B", target.n, static_cast<int>(rank), owners);
      low.scale = factor;
      ++n_found;
    }
  }
  require(n_found == nb::len(tensors), "adapter: holds a tensor that is no linear layer of the model");
  return adapter;
}

// A model together with the arrays it borrows.
struct OwnedModel {
  std::vector<nb::ndarray<nb::ro, nb::device::cpu>> owners;
  std::unique_ptr<onebit::Model> model;
};

OwnedModel make_model(nb::handle config, nb::dict tensors, nb::handle inv_freq, const std::string& isa, int threads,
                      bool int4_shortlist, nb::list adapters) {
  const onebit::Kernels* kernels = onebit::find_kernels(isa.c_str());
  require(kernels != nullptr, "isa ", isa, " is not available on this machine");
  require(threads >= 1 && threads <= kMaxThreads, "threads is ", threads, "; expected 1 to ", kMaxThreads);
  const onebit::ModelConfig values = read_config(config);
  require(values.n_heads % values.n_kv_heads == 0 && values.d_head % 2 == 0,
          "config: n_kv_heads must divide n_heads, and d_head must be even");
  Tensors source(std::move(tensors));
  onebit::ModelWeights weights = read_weights(values, nb::cast<bool>(config.attr("tied_head")), source);
  const auto head_encoding = weights.head.rows.encoding;
  require(!int4_shortlist || head_encoding == onebit::Encoding::kQ8, "shortlist int4: the head is ",
          onebit::kEncodingNames[static_cast<int>(head_encoding)],
          " codes, smaller than a shortlist; load the model without one");
  weights.head.int4_shortlist = int4_shortlist;
  const auto frequencies = array<float>(inv_freq, "inv_freq", 1);
  require(frequencies.size(0) == values.d_head / 2, "inv_freq: expected d_head / 2 values");
  for (int i = 0; i < values.d_head / 2; ++i) {
    require(frequencies.data[i] >= 0.0f && frequencies.data[i] <= 1.0f, "inv_freq: expected values from 0 to 1");
  }
  weights.inv_freq.assign(frequencies.data, frequencies.data + values.d_head / 2);
  auto owners = source.take_owners();
  std::vector<onebit::Adapter> added;
  for (const nb::handle adapter : adapters) {
    require(nb::isinstance<nb::tuple>(adapter) && nb::len(adapter) == 2, "adapters: expected (scale, tensors)");
    added.push_back(read_adapter(values, adapter[0], nb::cast<nb::dict>(adapter[1]), owners));
  }
  auto model = std::make_unique<onebit::Model>(values, std::move(weights), *kernels, threads, std::move(added));
  return {std::move(owners), std::move(model)};
}

onebit::KvCache new_cache(const onebit::ModelConfig& config, std::int64_t n_blocks, const std::string& kv_cache) {
  require(n_blocks >= 1 && n_blocks < (1 << 30), "n_blocks: expected at least 1");
  int format = 0;
  while (format < onebit::kKvFormats && kv_cache != onebit::kKvFormatNames[format]) ++format;
  require(format < onebit::kKvFormats, "kv_cache ", kv_cache, ": expected bf16, int8 or fp8");
  const auto kind = static_cast<onebit::KvFormat>(format);
  require(kind != onebit::KvFormat::kInt8 || config.d_head <= onebit::kMaxInt8Head, "kv_cache int8: heads of width ",
          config.d_head, " are too wide for exact sums; expected at most ", onebit::kMaxInt8Head, ", or use bf16");
  return {kind, config.n_layers, config.n_kv_heads, config.d_head, static_cast<int>(n_blocks)};
}

void check_range(const Array<std::int32_t>& values, const char* name, std::int64_t limit) {
  for (std::int64_t i = 0; i < values.size(0); ++i) {
    require(values.data[i] >= 0 && values.data[i] < limit, name, "[", i, "] is ", values.data[i], "; expected 0 to ",
            limit - 1);
  }
}

void check_sequences(const onebit::Batch& batch, int n_blocks) {
  require(batch.seq_starts[0] == 0 && batch.seq_starts[batch.n_seqs] == batch.n_tokens,
          "seq_starts: expected to begin with 0 and end with the number of tokens, ", batch.n_tokens);
  for (int seq = 0; seq < batch.n_seqs; ++seq) {
    const int begin = batch.seq_starts[seq];
    const int end = batch.seq_starts[seq + 1];
    require(begin <= end && end <= batch.n_tokens, "seq_starts: expected ascending values");
    if (begin == end) continue;
    for (int t = begin + 1; t < end; ++t) {
      require(batch.positions[t] == batch.positions[t - 1] + 1, "positions[", t,
              "] does not follow the position before it in sequence ", seq);
    }
    const int n_used = batch.positions[end - 1] / onebit::kBlockTokens + 1;
    require(n_used <= batch.table_width, "block_tables: sequence ", seq, " needs ", n_used, " blocks, the table has ",
            batch.table_width);
    for (int b = 0; b < n_used; ++b) {
      const int block = batch.block_tables[static_cast<std::size_t>(seq) * batch.table_width + b];
      require(block >= 0 && block < n_blocks, "block_tables[", seq, ", ", b, "] is ", block, "; expected 0 to ",
              n_blocks - 1);
    }
  }
}

// float32 [n_rows, n_vocab] to write to.
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void forward(OwnedModel& self, nb::handle tokens, nb::handle positions, nb::handle seq_starts, nb::handle block_tables,
             nb::handle rows, nb::handle top_k, onebit::KvCache& cache, Logits logits, nb::handle adapters) {
  const onebit::ModelConfig& config = self.model->config();
  const auto tokens_T = array<std::int32_t>(tokens, "tokens", 1);
  const auto positions_T = array<std::int32_t>(positions, "positions", 1);
  const auto starts_S = array<std::int32_t>(seq_starts, "seq_starts", 1);
  const auto tables_SB = array<std::int32_t>(block_tables, "block_tables", 2);
  const auto rows_R = array<std::int32_t>(rows, "rows", 1);
  const auto top_k_R = array<std::int32_t>(top_k, "top_k", 1);
  require(tokens_T.size(0) >= 1 && tokens_T.size(0) < (1 << 24), "tokens: expected 1 to 2^24 - 1 tokens");
  require(positions_T.size(0) == tokens_T.size(0), "positions: expected one for each of the ", tokens_T.size(0),
          " tokens");
  require(starts_S.size(0) >= 2 && starts_S.size(0) - 1 == tables_SB.size(0),
          "seq_starts: expected one more value than block_tables has rows, ", tables_SB.size(0) + 1);
  require(tables_SB.size(1) < (1 << 24) && rows_R.size(0) < (1 << 24), "block_tables or rows: too large");
  check_range(tokens_T, "tokens", config.vocab_size);
  check_range(positions_T, "positions", config.max_seq_len);
  check_range(rows_R, "rows", tokens_T.size(0));
  require(top_k_R.size(0) == rows_R.size(0), "top_k: expected one for each of the ", rows_R.size(0), " rows");
  check_range(top_k_R, "top_k", std::int64_t{config.vocab_size} + 1);
  const auto adapters_S = array<std::int32_t>(adapters, "adapters", 1);
  require(adapters_S.size(0) == tables_SB.size(0), "adapters: expected one for each of the ", tables_SB.size(0),
          " sequences");
  for (std::int64_t i = 0; i < adapters_S.size(0); ++i) {
    require(adapters_S.data[i] >= -1 && adapters_S.data[i] < self.model->n_adapters(), "adapters[", i, "] is ",
            adapters_S.data[i], "; the model has ", self.model->n_adapters(), " adapters, and -1 is none");
  }
  require(
      cache.n_layers() == config.n_layers && cache.n_kv_heads() == config.n_kv_heads && cache.d_head() == config.d_head,
      "cache: made for a model of another shape");
  const onebit::Batch batch{
      .tokens = tokens_T.data,
      .positions = positions_T.data,
      .seq_starts = starts_S.data,
      .block_tables = tables_SB.data,
      .rows = rows_R.data,
      .top_k = top_k_R.data,
      .n_tokens = static_cast<int>(tokens_T.size(0)),
      .n_seqs = static_cast<int>(tables_SB.size(0)),
      .table_width = static_cast<int>(tables_SB.size(1)),
      .n_rows = static_cast<int>(rows_R.size(0)),
      .adapters = adapters_S.data,
  };
  check_sequences(batch, cache.n_blocks());

  require(static_cast<std::int64_t>(logits.shape(0)) == batch.n_rows &&
              static_cast<std::int64_t>(logits.shape(1)) == config.vocab_size,
          "logits: expected room for ", shape_text({batch.n_rows, config.vocab_size}), " values");
  nb::gil_scoped_release release;
  self.model->forward(batch, cache, logits.data());
}

void check_logits(const float* logits, std::int64_t n) {
  constexpr float kMax = std::numeric_limits<float>::max();
  int n_bad = 0;
  int n_finite = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    n_bad += !(logits[i] <= kMax);
    n_finite += logits[i] >= -kMax;
  }
  for (std::int64_t i = 0; n_bad > 0 && i < n; ++i) {
    require(logits[i] <= kMax, "logits[", i, "] is ", (std::isnan(logits[i]) ? "NaN" : "infinite"));
  }
  require(n_finite > 0, "logits: all are -infinity");
}

std::vector<int> sample(nb::handle logits, nb::handle ids, double temperature, std::int64_t top_k, double top_p,
                        double min_p, double repetition_penalty, std::uint64_t seed, std::uint64_t counter) {
  const auto logits_RV = array<float>(logits, "logits", 2);
  const auto tokens = array<std::int32_t>(ids, "ids", 1);
  const std::int64_t n_rows = logits_RV.size(0);
  const std::int64_t n_vocab = logits_RV.size(1);
  require(n_rows >= 1 && n_vocab >= 1 && n_vocab <= std::numeric_limits<std::int32_t>::max(), "logits: expected some");
  require(n_rows - 1 <= tokens.size(0), "ids: expected one for each row of logits but the first, ", n_rows - 1);
  // Ids that change nothing are not looked at: a long text would cost more with every token.
  if (repetition_penalty != 1.0) check_range(tokens, "ids", n_vocab);
  require(std::isfinite(temperature) && temperature >= 0.0, "temperature: expected a number of at least 0");
  require(top_k >= 0, "top_k: expected 0 (all) or more");
  require(top_p > 0.0 && top_p <= 1.0, "top_p: expected more than 0 and at most 1");
  require(min_p >= 0.0 && min_p <= 1.0, "min_p: expected 0 to 1");
  require(repetition_penalty >= 1e-6 && repetition_penalty <= 1e6, "repetition_penalty: expected 1e-6 to 1e6");
  onebit::SamplingParams params{
      .repetition_penalty = static_cast<float>(repetition_penalty),
      .temperature = temperature,
      .top_k = static_cast<int>(std::min<std::int64_t>(top_k, n_vocab)),
      .top_p = top_p,
      .min_p = min_p,
      .seed = seed,
      .counter = counter,
  };
  const std::size_t n_known = static_cast<std::size_t>(tokens.size(0) - (n_rows - 1));
  std::vector<int> drawn;
  drawn.reserve(static_cast<std::size_t>(n_rows));
  for (std::int64_t r = 0; r < n_rows; ++r, ++params.counter) {
    const float* row = logits_RV.data + r * n_vocab;
    check_logits(row, n_vocab);
    const std::size_t n_history = n_known + static_cast<std::size_t>(r);
    drawn.push_back(onebit::sample({row, static_cast<std::size_t>(n_vocab)}, {tokens.data, n_history}, params));
    if (r + 1 < n_rows && drawn.back() != tokens.data[n_history]) break;
  }
  return drawn;
}

template <int (*kList)(const onebit::Kernels**, int) noexcept>
std::vector<std::string> table_names() {
  const onebit::Kernels* tables[kMaxKernels];
  const int n = std::min(kList(tables, kMaxKernels), kMaxKernels);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(tables[i]->name);
  return names;
}

nb::tuple sine_cosine(double x) {
  require(x >= 0.0 && x < 0x1p24, "x: expected 0 to 2^24");
  double s, c;
  onebit::sincos(x, &s, &c);
  return nb::make_tuple(s, c);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The compiled core of onebit. Only onebit.engine.model imports it.";
  m.attr("BLOCK_TOKENS") = onebit::kBlockTokens;
  m.attr("SPLIT_TOKENS") = onebit::kSplitTokens;
  auto kernels = m.def_submodule("kernels", "Every kernel of every instruction set, for tests.");
  bind_kernels(kernels);

  m.def("available_isas", &table_names<onebit::available_kernels>,
        "Names of the instruction sets that this build and this CPU run, best first.");
  m.def("broken_isas", &table_names<onebit::broken_kernels>,
        "Names of the instruction sets that this CPU should run, and whose kernels failed their self-test.");
  m.def("sincos", &sine_cosine, "x"_a,
        "The float64 sine and cosine behind the rotary position angles, for 0 <= x < 2^24.");
  m.def("sample", &sample, "logits"_a, "ids"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
        "repetition_penalty"_a, "seed"_a, "counter"_a,
        nb::sig("def sample(logits: numpy.typing.NDArray[numpy.float32], ids: numpy.typing.NDArray[numpy.int32], "
                "temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int, "
                "counter: int) -> list[int]"),
        "Draw token ids from logits [R, V] while they equal the last R - 1 ids; those before are prompt and output.");
  m.def(
      "exp_negative",
      [](double x) {
        require(x <= 0.0, "x: expected at most 0");
        return onebit::exp_negative(x);
      },
      "x"_a, "The float64 exponential behind the sampler, for x <= 0.");
  m.def(
      "philox",
      [](std::uint64_t counter_low, std::uint64_t counter_high, std::uint64_t key) {
        const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
        const auto words =
            onebit::philox({low(counter_low), low(counter_low >> 32), low(counter_high), low(counter_high >> 32)},
                           {low(key), low(key >> 32)});
        return nb::make_tuple(words[0], words[1], words[2], words[3]);
      },
      "counter_low"_a, "counter_high"_a, "key"_a,
      nb::sig("def philox(counter_low: int, counter_high: int, key: int) -> tuple[int, int, int, int]"),
      "Four random words of Philox 4x32-10.");

  nb::class_<PackedArrays>(m, "PackedMatrix", "A packed matrix that borrows its arrays.")
      .def(
          "__init__",
          [](PackedArrays* self, const std::string& encoding, std::int64_t n, std::int64_t k, nb::handle data,
             nb::handle scale) { new (self) PackedArrays(make_packed(encoding, n, k, data, scale)); },
          "encoding"_a, "n"_a, "k"_a, "data"_a, "scale"_a,
          nb::sig("def __init__(self, encoding: str, n: int, k: int, data: numpy.typing.NDArray[numpy.uint8], "
                  "scale: numpy.typing.NDArray[numpy.float32]) -> None"),
          "data: uint8 [tiles, k_padded / 4, 64]; scale: float32 [1], [n] or [n, groups].");

  nb::class_<onebit::KvCache>(m, "KvCache", "Keys and values in blocks of BLOCK_TOKENS positions.")
      .def_prop_ro("n_blocks", &onebit::KvCache::n_blocks, "Blocks in the cache.")
      .def_prop_ro("bytes", &onebit::KvCache::bytes, "Memory of all blocks.");

  nb::class_<OwnedModel>(m, "Model", "A transformer that borrows its weights.")
      .def(
          "__init__",
          [](OwnedModel* self, nb::handle config, nb::dict tensors, nb::handle inv_freq, const std::string& isa,
             int threads, bool int4_shortlist, nb::list adapters) {
            new (self) OwnedModel(
                make_model(config, std::move(tensors), inv_freq, isa, threads, int4_shortlist, std::move(adapters)));
          },
          "config"_a, "tensors"_a, "inv_freq"_a, "isa"_a, "threads"_a, "int4_shortlist"_a, "adapters"_a,
          nb::sig(
              "def __init__(self, config: object, tensors: dict[str, PackedMatrix | "
              "numpy.typing.NDArray[numpy.float32] | numpy.typing.NDArray[numpy.uint16]], "
              "inv_freq: numpy.typing.NDArray[numpy.float32], isa: str, threads: int, "
              "int4_shortlist: bool, adapters: list[tuple[float, dict[str, tuple[numpy.typing.NDArray[numpy.uint16], "
              "numpy.typing.NDArray[numpy.uint16]]]]]) -> None"),
          "config: a ModelConfig; tensors by name, bfloat16 as uint16; adapters: (scale, planes of A and B by name).")
      .def(
          "new_cache",
          [](const OwnedModel& self, std::int64_t n_blocks, const std::string& kv_cache) {
            return new_cache(self.model->config(), n_blocks, kv_cache);
          },
          "n_blocks"_a, "kv_cache"_a,
          "A cache of n_blocks blocks for this model, all zeros; kv_cache: bf16, int8 or fp8.")
      .def("forward", &forward, "tokens"_a, "positions"_a, "seq_starts"_a, "block_tables"_a, "rows"_a, "top_k"_a,
           "cache"_a, "logits"_a.noconvert(), "adapters"_a,
           nb::sig("def forward(self, tokens: numpy.typing.NDArray[numpy.int32], positions: "
                   "numpy.typing.NDArray[numpy.int32], "
                   "seq_starts: numpy.typing.NDArray[numpy.int32], block_tables: numpy.typing.NDArray[numpy.int32], "
                   "rows: numpy.typing.NDArray[numpy.int32], top_k: numpy.typing.NDArray[numpy.int32], "
                   "cache: KvCache, logits: numpy.typing.NDArray[numpy.float32], "
                   "adapters: numpy.typing.NDArray[numpy.int32]) -> None"),
           "Writes the logits [R, V] of the tokens in rows; see onebit.engine.model.Model.forward.")
      .def_prop_ro(
          "isa", [](const OwnedModel& self) { return std::string(self.model->kernels().name); },
          "Instruction set of the kernels.")
      .def_prop_ro("threads", [](const OwnedModel& self) { return self.model->n_threads(); }, "Threads in the pool.");
}
