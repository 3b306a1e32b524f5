// Numbers without a pattern, the same on every platform.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

class Random {
 public:
  explicit Random(std::uint64_t seed = 1) : state_(seed) {}

  // The splitmix64 generator, upper half.
  std::uint32_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return static_cast<std::uint32_t>((z ^ (z >> 31)) >> 32);
  }

  int between(int low, int high) { return low + static_cast<int>(next() % static_cast<std::uint32_t>(high - low + 1)); }

  // In [-2, 2), 24 random bits.
  float value() { return static_cast<float>(static_cast<std::int32_t>(next()) >> 8) * 0x1p-22f; }

  std::vector<float> values(int n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = value();
    return x;
  }

  // bfloat16, cut off.
  std::vector<std::uint16_t> halves(int n) {
    std::vector<std::uint16_t> x(static_cast<std::size_t>(n));
    for (std::uint16_t& v : x) v = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value()) >> 16);
    return x;
  }

  std::vector<std::uint8_t> bytes(std::size_t n) {
    std::vector<std::uint8_t> x(n);
    for (std::uint8_t& v : x) v = static_cast<std::uint8_t>(next());
    return x;
  }

 private:
  std::uint64_t state_;
};
