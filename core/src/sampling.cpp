#include "onebit/sampling.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "onebit/float_mode.h"

namespace onebit {
namespace {

// Taylor coefficients of exp: for |x| <= ln(2) / 2 the first neglected term is below 2^-57.
constexpr auto kInverseFactorial = [] {
  std::array<double, 14> values{};
  double factorial = 1.0;
  for (std::size_t n = 0; n < values.size(); ++n) {
    values[n] = 1.0 / factorial;
    factorial *= static_cast<double>(n + 1);
  }
  return values;
}();

struct Candidate {
  float logit;
  std::int32_t id;
};

bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Candidates in rank order, sorted only as far as they are looked at: a draw rarely needs more than the first few.
class Ranking {
 public:
  explicit Ranking(std::vector<Candidate> candidates) : candidates_(std::move(candidates)) {}

  std::size_t size() const { return candidates_.size(); }

  const Candidate& operator[](std::size_t rank) {
    if (rank >= sorted_) sort_to(std::min(size(), std::max(kFirst, 8 * sorted_)));
    return candidates_[rank];
  }

 private:
  static constexpr std::size_t kFirst = 64;

  void sort_to(std::size_t n) {
    const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(sorted_);
    const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(n);
    if (n <= kFirst) {
      std::partial_sort(begin, end, candidates_.end(), ranks_before);
    } else {
      if (end != candidates_.end()) std::nth_element(begin, end, candidates_.end(), ranks_before);
      std::sort(begin, end, ranks_before);
    }
    sorted_ = n;
  }

  std::vector<Candidate> candidates_;
  std::size_t sorted_ = 0;
};

std::vector<Candidate> all(std::span<const float> logits) {
  std::vector<Candidate> candidates(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) candidates[i] = {logits[i], static_cast<std::int32_t>(i)};
  return candidates;
}

// The k candidates that rank first, in no order; 1 <= k <= logits.size().
std::vector<Candidate> best(std::span<const float> logits, std::size_t k) {
  // Of n maxima of disjoint parts the k-th largest is a bound that at least k logits reach, and few others.
  const std::size_t n = std::max<std::size_t>(64, std::bit_ceil(4 * k));
  std::vector<Candidate> candidates;
  if (n < logits.size()) {
    std::vector<float> maxima(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(n));
    float* m = maxima.data();
    for (std::size_t begin = n; begin + n <= logits.size(); begin += n) {
      const float* x = logits.data() + begin;
      for (std::size_t i = 0; i < n; ++i) m[i] = x[i] > m[i] ? x[i] : m[i];
    }
    std::nth_element(m, m + (k - 1), m + n, std::greater<float>());
    const float bound = m[k - 1];
    candidates.reserve(2 * k);
    const auto take = [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        if (logits[i] >= bound) candidates.push_back({logits[i], static_cast<std::int32_t>(i)});
      }
    };
    constexpr std::size_t kRun = 32;
    std::size_t begin = 0;
    for (; begin + kRun <= logits.size(); begin += kRun) {
      int n_above = 0;
      for (std::size_t i = 0; i < kRun; ++i) n_above += logits[begin + i] >= bound;
      if (n_above > 0) take(begin, begin + kRun);
    }
    take(begin, logits.size());
  } else {
    candidates = all(logits);
  }
  const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(k);
  if (last != candidates.end()) std::nth_element(candidates.begin(), last, candidates.end(), ranks_before);
  candidates.resize(k);
  return candidates;
}

std::vector<float> penalized(std::span<const float> logits, std::span<const std::int32_t> history, float penalty) {
  std::vector<float> changed(logits.begin(), logits.end());
  for (const std::int32_t id : history) {
    // From the original logit, so that an id which occurs twice is penalised once.
    const float logit = logits[static_cast<std::size_t>(id)];
    if (logit == -std::numeric_limits<float>::infinity()) continue;
    changed[static_cast<std::size_t>(id)] =
        std::clamp(logit > 0.0f ? logit / penalty : logit * penalty, std::numeric_limits<float>::lowest(),
                   std::numeric_limits<float>::max());
  }
  return changed;
}

// Uniform in [0, 1), 53 bits.
double uniform(std::uint64_t seed, std::uint64_t counter) {
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  const auto words = philox({low(counter), high(counter), 0, 0}, {low(seed), high(seed)});
  const std::uint64_t bits = static_cast<std::uint64_t>(words[0]) << 32 | words[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
  // Golden ratio and sqrt(3) - 1, as fractions of 2^32.
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = kMultiplier0 * counter[0];
    const std::uint64_t b = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

double exp_negative(double x) noexcept {
  if (x < -708.0) return 0.0;
  // ln 2 in parts of 32 and 53 bits: a small whole number times the first is exact.
  constexpr double kLn2High = 0x1.62e42fee00000p-1;
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kOverLn2 = 0x1.71547652b82fep+0;
  const int power = -static_cast<int>(0.5 - x * kOverLn2);
  const double r = (x - power * kLn2High) - power * kLn2Low;
  double sum = kInverseFactorial.back();
  for (std::size_t n = kInverseFactorial.size() - 1; n-- > 0;) sum = kInverseFactorial[n] + sum * r;
  return sum * std::bit_cast<double>(static_cast<std::uint64_t>(power + 1023) << 52);
}

int sample(std::span<const float> logits, std::span<const std::int32_t> history, const SamplingParams& params) {
  StandardFloatMode float_mode;
  std::vector<float> changed;
  if (params.repetition_penalty != 1.0f) {
    changed = penalized(logits, history, params.repetition_penalty);
    logits = changed;
  }
  if (params.temperature == 0.0 || params.top_k == 1) return best(logits, 1).front().id;

  const std::size_t top_k = static_cast<std::size_t>(params.top_k);
  const bool keep_all = top_k == 0 || top_k >= logits.size();
  std::vector<Candidate> candidates = keep_all ? all(logits) : best(logits, top_k);
  const Candidate first = *std::min_element(candidates.begin(), candidates.end(), ranks_before);
  // Probability relative to the best token, which therefore has 1.
  const auto weight = [&](const Candidate& candidate) {
    return exp_negative((static_cast<double>(candidate.logit) - first.logit) / params.temperature);
  };
  double total = 0.0;
  if (keep_all) {
    for (const Candidate& candidate : candidates) total += weight(candidate);
  }
  Ranking ranking(std::move(candidates));
  std::vector<double> weights;
  weights.reserve(keep_all ? 0 : ranking.size());
  const auto weight_at = [&](std::size_t rank) {
    if (rank == weights.size()) weights.push_back(weight(ranking[rank]));
    return weights[rank];
  };
  if (!keep_all) {
    for (std::size_t rank = 0; rank < ranking.size(); ++rank) total += weight_at(rank);
  }

  // Both filters leave a prefix of the ranking, which holds `total` of the weight.
  std::size_t n_kept = ranking.size();
  if (params.top_p < 1.0 || params.min_p > 0.0) {
    const double enough = params.top_p < 1.0 ? params.top_p * total : std::numeric_limits<double>::infinity();
    double sum = 0.0;
    for (n_kept = 0; n_kept < ranking.size() && sum < enough; ++n_kept) {
      const double w = weight_at(n_kept);
      if (w < params.min_p) break;
      sum += w;
    }
    total = sum;
  }

  const double target = uniform(params.seed, params.counter) * total;
  double sum = 0.0;
  std::int32_t last = first.id;
  for (std::size_t rank = 0; rank < n_kept; ++rank) {
    const double w = weight_at(rank);
    if (w == 0.0) break;
    last = ranking[rank].id;
    sum += w;
    if (sum > target) break;
  }
  return last;
}

}  // namespace onebit
