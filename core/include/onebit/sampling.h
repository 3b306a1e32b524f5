// Choosing the next token from logits. The result depends on nothing but the arguments.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace onebit {

// Philox 4x32-10: ten rounds of a bijection of the counter, selected by the key.
// Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept;

// exp(x) for x <= 0 within 1e-15 relative, 0 below -708: basic arithmetic alone, the same bits on every platform.
double exp_negative(double x) noexcept;

// Filters apply in this order, each to what the one before has left.
struct SamplingParams {
  float repetition_penalty;  // of tokens in the history: positive logits are divided by it, others multiplied; 1: off
  double temperature;        // divides the logits; 0: the most likely token
  int top_k;                 // keep the k most likely tokens; 0: all
  double top_p;              // keep the fewest most likely tokens whose probabilities reach top_p; 1: all
  double min_p;              // keep tokens at least min_p times as likely as the most likely one; 0: all
  std::uint64_t seed;
  std::uint64_t counter;  // the position in the sequence: every draw of a seed has its own random number
};

// Draws a token id. Equally likely tokens rank by ascending id. Logits are not NaN or +infinity, and not all -infinity;
// history holds token ids of prompt and output. Throws std::bad_alloc.
int sample(std::span<const float> logits, std::span<const std::int32_t> history, const SamplingParams& params);

}  // namespace onebit
