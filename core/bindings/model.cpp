#include "model.h"

#include <nanobind/stl/string.h>

#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <utility>

#include "arrays.h"
#include "onebit/adapter.h"
#include "onebit/kernels.h"

namespace onebit::bindings {
namespace {

// 127 * 127 * inputs must fit an int32 sum.
constexpr std::int64_t kMaxInputs = 1 << 17;
constexpr int kMaxThreads = 1024;
constexpr std::int64_t kMaxRank = 1 << 14;

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

}  // namespace

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

}  // namespace onebit::bindings
