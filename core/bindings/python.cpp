// The Python face of the core: checks everything that comes from outside, then calls code that trusts its arguments.
// Arrays are borrowed without a copy and kept alive; what does not fit raises ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arrays.h"
#include "model.h"
#include "onebit/kernels.h"
#include "onebit/kv_cache.h"
#include "onebit/model.h"
#include "onebit/rope.h"
#include "onebit/sampling.h"
#include "onebit/types.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace onebit::bindings;

void bind_kernels(nb::module_& m);

namespace {

constexpr int kMaxKernels = 16;

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

// int64 [n_layers, kLayerInputs, 2] to add to.
using Counts = nb::ndarray<std::int64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
static_assert(sizeof(onebit::CodeCounts) == 2 * sizeof(std::int64_t));

// float32 [n_rows, width] to write to.
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Checks the arrays of a call and hands them to compute(batch); without top_k, it is null there.
template <typename Compute>
void run(OwnedModel& self, nb::handle tokens, nb::handle positions, nb::handle seq_starts, nb::handle block_tables,
         nb::handle rows, const nb::handle* top_k, const onebit::KvCache& cache, nb::handle adapters, Compute compute) {
  const onebit::ModelConfig& config = self.model->config();
  const auto tokens_T = array<std::int32_t>(tokens, "tokens", 1);
  const auto positions_T = array<std::int32_t>(positions, "positions", 1);
  const auto starts_S = array<std::int32_t>(seq_starts, "seq_starts", 1);
  const auto tables_SB = array<std::int32_t>(block_tables, "block_tables", 2);
  const auto rows_R = array<std::int32_t>(rows, "rows", 1);
  require(tokens_T.size(0) >= 1 && tokens_T.size(0) < (1 << 24), "tokens: expected 1 to 2^24 - 1 tokens");
  require(positions_T.size(0) == tokens_T.size(0), "positions: expected one for each of the ", tokens_T.size(0),
          " tokens");
  require(starts_S.size(0) >= 2 && starts_S.size(0) - 1 == tables_SB.size(0),
          "seq_starts: expected one more value than block_tables has rows, ", tables_SB.size(0) + 1);
  require(tables_SB.size(1) < (1 << 24) && rows_R.size(0) < (1 << 24), "block_tables or rows: too large");
  check_range(tokens_T, "tokens", config.vocab_size);
  check_range(positions_T, "positions", config.max_seq_len);
  check_range(rows_R, "rows", tokens_T.size(0));
  const auto top_k_R = array<std::int32_t>(top_k ? *top_k : rows, "top_k", 1);
  require(top_k_R.size(0) == rows_R.size(0), "top_k: expected one for each of the ", rows_R.size(0), " rows");
  if (top_k) check_range(top_k_R, "top_k", std::int64_t{config.vocab_size} + 1);
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
  onebit::Batch batch{
      .tokens = tokens_T.data,
      .positions = positions_T.data,
      .seq_starts = starts_S.data,
      .block_tables = tables_SB.data,
      .rows = rows_R.data,
      .top_k = top_k ? top_k_R.data : nullptr,
      .n_tokens = static_cast<int>(tokens_T.size(0)),
      .n_seqs = static_cast<int>(tables_SB.size(0)),
      .table_width = static_cast<int>(tables_SB.size(1)),
      .n_rows = static_cast<int>(rows_R.size(0)),
      .adapters = adapters_S.data,
  };
  check_sequences(batch, cache.n_blocks());
  compute(batch);
}

void check_room(const Rows& out, const char* name, int n_rows, int width) {
  require(static_cast<std::int64_t>(out.shape(0)) == n_rows && static_cast<std::int64_t>(out.shape(1)) == width, name,
          ": expected room for ", shape_text({n_rows, width}), " values");
}

void forward(OwnedModel& self, nb::handle tokens, nb::handle positions, nb::handle seq_starts, nb::handle block_tables,
             nb::handle rows, nb::handle top_k, onebit::KvCache& cache, Rows logits, nb::handle adapters,
             std::optional<Counts> code_counts) {
  run(self, tokens, positions, seq_starts, block_tables, rows, &top_k, cache, adapters, [&](onebit::Batch& batch) {
    check_room(logits, "logits", batch.n_rows, self.model->config().vocab_size);
    if (code_counts) {
      const auto n_layers = static_cast<std::size_t>(self.model->config().n_layers);
      require(code_counts->shape(0) == n_layers && code_counts->shape(1) == onebit::kLayerInputs &&
                  code_counts->shape(2) == 2,
              "code_counts: expected ", shape_text({self.model->config().n_layers, onebit::kLayerInputs, 2}));
      batch.code_counts = reinterpret_cast<onebit::CodeCounts*>(code_counts->data());
    }
    nb::gil_scoped_release release;
    self.model->forward(batch, cache, logits.data());
  });
}

void forward_hidden(OwnedModel& self, nb::handle tokens, nb::handle positions, nb::handle seq_starts,
                    nb::handle block_tables, nb::handle rows, onebit::KvCache& cache, Rows hidden,
                    nb::handle adapters) {
  run(self, tokens, positions, seq_starts, block_tables, rows, nullptr, cache, adapters,
      [&](const onebit::Batch& batch) {
        check_room(hidden, "hidden", batch.n_rows, self.model->config().d_model);
        nb::gil_scoped_release release;
        self.model->forward_hidden(batch, cache, hidden.data());
      });
}

using Numbers = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

void read_block(const onebit::KvCache& self, std::int64_t layer, std::int64_t block, Numbers out) {
  require(layer >= 0 && layer < self.n_layers(), "layer is ", layer, "; expected 0 to ", self.n_layers() - 1);
  require(block >= 0 && block < self.n_blocks(), "block is ", block, "; expected 0 to ", self.n_blocks() - 1);
  const std::int64_t shape[] = {2, self.n_kv_heads(), onebit::kBlockTokens, self.d_head()};
  for (std::size_t i = 0; i < 4; ++i) {
    require(static_cast<std::int64_t>(out.shape(i)) == shape[i], "out: expected ",
            shape_text({shape[0], shape[1], shape[2], shape[3]}));
  }
  self.read(static_cast<int>(layer), static_cast<int>(block), out.data());
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

// Of every table that this CPU should run, the kernels that answer otherwise than the scalar ones now.
std::map<std::string, std::vector<std::string>> self_test() {
  const onebit::Kernels* tables[2 * kMaxKernels];
  const int n_available = std::min(onebit::available_kernels(tables, kMaxKernels), kMaxKernels);
  const int n_broken = std::min(onebit::broken_kernels(tables + n_available, kMaxKernels), kMaxKernels);
  std::map<std::string, std::vector<std::string>> found;
  for (int i = 0; i < n_available + n_broken; ++i) {
    const char* names[64];
    const int n = onebit::self_test(*onebit::find_kernels("scalar"), *tables[i], names, 64);
    found[tables[i]->name].assign(names, names + n);
  }
  return found;
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
  m.def("self_test", &self_test,
        "Kernels that now answer otherwise than the scalar ones, by instruction sets that this CPU should run.");
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
      .def_prop_ro("bytes", &onebit::KvCache::bytes, "Memory of all blocks.")
      .def("read_block", &read_block, "layer"_a, "block"_a, "out"_a.noconvert(),
           nb::sig("def read_block(self, layer: int, block: int, out: numpy.typing.NDArray[numpy.float32]) -> None"),
           "Writes keys and values of a block, [2, kv heads, BLOCK_TOKENS, d_head]; no forward pass may write them.");

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
           "cache"_a, "logits"_a.noconvert(), "adapters"_a, "code_counts"_a.noconvert().none() = nb::none(),
           nb::sig("def forward(self, tokens: numpy.typing.NDArray[numpy.int32], positions: "
                   "numpy.typing.NDArray[numpy.int32], "
                   "seq_starts: numpy.typing.NDArray[numpy.int32], block_tables: numpy.typing.NDArray[numpy.int32], "
                   "rows: numpy.typing.NDArray[numpy.int32], top_k: numpy.typing.NDArray[numpy.int32], "
                   "cache: KvCache, logits: numpy.typing.NDArray[numpy.float32], "
                   "adapters: numpy.typing.NDArray[numpy.int32], "
                   "code_counts: numpy.typing.NDArray[numpy.int64] | None = None) -> None"),
           "Writes the logits [R, V] of the tokens in rows; see onebit.engine.model.Model.forward.")
      .def("forward_hidden", &forward_hidden, "tokens"_a, "positions"_a, "seq_starts"_a, "block_tables"_a, "rows"_a,
           "cache"_a, "hidden"_a.noconvert(), "adapters"_a,
           nb::sig("def forward_hidden(self, tokens: numpy.typing.NDArray[numpy.int32], positions: "
                   "numpy.typing.NDArray[numpy.int32], "
                   "seq_starts: numpy.typing.NDArray[numpy.int32], block_tables: numpy.typing.NDArray[numpy.int32], "
                   "rows: numpy.typing.NDArray[numpy.int32], cache: KvCache, "
                   "hidden: numpy.typing.NDArray[numpy.float32], "
                   "adapters: numpy.typing.NDArray[numpy.int32]) -> None"),
           "Writes the hidden states [R, D] of the tokens in rows; see onebit.engine.model.Model.forward_hidden.")
      .def_prop_ro(
          "isa", [](const OwnedModel& self) { return std::string(self.model->kernels().name); },
          "Instruction set of the kernels.")
      .def_prop_ro("threads", [](const OwnedModel& self) { return self.model->n_threads(); }, "Threads in the pool.");
}
