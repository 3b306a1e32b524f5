// Golden: known answers of Philox. Invariant: filters and extremes of a draw.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "onebit/sampling.h"

namespace {

onebit::SamplingParams params(std::uint64_t counter) {
  return {.repetition_penalty = 1.0f,
          .temperature = 1.0,
          .top_k = 0,
          .top_p = 1.0,
          .min_p = 0.0,
          .seed = 7,
          .counter = counter};
}

void test_philox_known_answers() {
  using Words = std::array<std::uint32_t, 4>;
  const std::uint32_t ones = 0xffffffff;
  CHECK((onebit::philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((onebit::philox({ones, ones, ones, ones}, {ones, ones}) ==
         Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

// Flat logits make a draw walk through the whole ranking, however far that must be sorted.
void test_flat_logits_reach_every_rank() {
  const std::vector<float> logits(5000, -3.5f);
  int low = 0, high = 0;
  for (std::uint64_t i = 0; i < 64; ++i) {
    const int token = onebit::sample(logits, {}, params(i));
    CHECK(token >= 0 && token < 5000);
    low += token < 1000;
    high += token >= 4000;
  }
  CHECK(low > 0 && high > 0);
}

void test_extreme_values_stay_in_range() {
  const float largest = std::numeric_limits<float>::max();
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  const std::vector<float> logits = {largest, -largest, minus_infinity, largest};
  const std::vector<std::int32_t> history = {0, 1, 2, 3, 3};
  for (const float penalty : {1e-6f, 1.0f, 1e6f}) {
    for (const double temperature : {5e-324, 1.0, 1e308}) {
      for (std::uint64_t i = 0; i < 8; ++i) {
        onebit::SamplingParams p = params(i);
        p.repetition_penalty = penalty;
        p.temperature = temperature;
        CHECK(onebit::sample(logits, history, p) != 2);
      }
    }
  }
}

void test_exp_equals_the_c_library() {
  for (double x = 0.0; x > -708.0; x -= 0.37) CHECK(std::fabs(onebit::exp_negative(x) / std::exp(x) - 1.0) < 1e-15);
  CHECK(onebit::exp_negative(-std::numeric_limits<double>::infinity()) == 0.0);
}

}  // namespace

void test_sampling() {
  test_philox_known_answers();
  test_flat_logits_reach_every_rank();
  test_extreme_values_stay_in_range();
  test_exp_equals_the_c_library();
}
