// The float work of every SIMD table, written once in vector extensions and compiled per instruction set.
//
// Included inside a namespace of its own by a file that has set kVectorBytes, the width of a register, and included
// onebit/kernels.h. Outputs may be one of the inputs; otherwise memory does not overlap.
//
// Elementwise arithmetic is a plain loop: IEEE operations give the same bits at any width, and compilers vectorise it.
// They do not vectorise choices between floats, so what has one is written in `Vector`, one register. Sums follow the
// one order of docs/numerics.md. A block of 16 values is `Lanes`, one value per lane:
//
//   values    0 .. 15   16 .. 31   32 .. 47
//   lane l      x[l] + x[16 + l] + x[32 + l] ...                  ascending; starts at +0, short blocks end in zeros
//   total     fold<8>: (0, 8) (1, 9) ..  fold<4>: (0, 4) ..  fold<2>  fold<1>
//
//   one register of  AVX-512 |------------- 16 lanes --------------|
//                    AVX2    |----- part 0 -----|----- part 1 -----|
//                    NEON    |-- 0 --|-- 1 --|-- 2 --|-- 3 --|
//
// Work per value: sums 1 load, 2 operations.

#define ONEBIT_INLINE inline __attribute__((always_inline))
// Arrays of registers stay in registers only where the loops over them are unrolled.
#define ONEBIT_UNROLL _Pragma("GCC unroll 32")

constexpr int kLaneCount = 16;
constexpr int kPartLanes = kVectorBytes / 4;
constexpr int kParts = kLaneCount / kPartLanes;

using Vector = float __attribute__((vector_size(kVectorBytes)));
using IntVector = std::int32_t __attribute__((vector_size(kVectorBytes)));
using BitsVector = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using HalfVector = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using ByteVector = std::int8_t __attribute__((vector_size(kVectorBytes / 4)));
using CodeVector = std::uint8_t __attribute__((vector_size(kVectorBytes / 4)));

struct Lanes {
  Vector part[kParts];
};

// ---- Lanes ----

ONEBIT_INLINE Lanes splat(float x) {
  Lanes a;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) a.part[i] = x - Vector{};
  return a;
}

ONEBIT_INLINE Lanes load_lanes(const float* x) {
  Lanes a;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(&a.part[i], x + i * kPartLanes, sizeof a.part[i]);
  return a;
}

// Numbers of a cache, as they lie in memory: bfloat16, the upper half of a float, and e4m3, see scalar.cpp.
struct Bf16 {
  std::uint16_t bits;
};

struct E4M3 {
  std::uint8_t bits;
};

// One instruction, for which GCC 12 takes four. With a full mask, as it warns of the intrinsic without one.
ONEBIT_INLINE IntVector widen(HalfVector half) {
#if defined(__AVX512F__)
  return (IntVector)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif defined(__AVX2__)
  return (IntVector)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, IntVector);
#endif
}

ONEBIT_INLINE Lanes load_lanes(const Bf16* x) {
  Lanes a;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) {
    HalfVector half;
    __builtin_memcpy(&half, x + i * kPartLanes, sizeof half);
    a.part[i] = (Vector)(widen(half) << 16);
  }
  return a;
}

ONEBIT_INLINE Lanes load_lanes(const E4M3* x) {
  Lanes a;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) {
    CodeVector bytes;
    __builtin_memcpy(&bytes, x + i * kPartLanes, sizeof bytes);
    // In two steps, which GCC has instructions for.
    const IntVector code = __builtin_convertvector(__builtin_convertvector(bytes, HalfVector), IntVector);
    const IntVector magnitude = code & 0x7f;
    const Vector small = __builtin_convertvector(magnitude, Vector) * 0x1p-9f;
    const IntVector value = magnitude > 7 ? (magnitude << 20) + (120 << 23) : (IntVector)small;
    a.part[i] = (Vector)(value | (code & 0x80) << 24);
  }
  return a;
}

// The first n <= 16 values; zeros in the other lanes.
template <typename T>
ONEBIT_INLINE Lanes load_lanes(const T* x, int n) {
  if (n == kLaneCount) return load_lanes(x);
  T padded[kLaneCount] = {};
  __builtin_memcpy(padded, x, static_cast<std::size_t>(n) * sizeof *x);
  return load_lanes(padded);
}

ONEBIT_INLINE void store_lanes(float* y, const Lanes& a) {
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(y + i * kPartLanes, &a.part[i], sizeof a.part[i]);
}

ONEBIT_INLINE void store_lanes(float* y, const Lanes& a, int n) {
  if (n == kLaneCount) return store_lanes(y, a);
  float padded[kLaneCount];
  store_lanes(padded, a);
  __builtin_memcpy(y, padded, static_cast<std::size_t>(n) * sizeof *y);
}

// f of each register of a, or of a and b.
template <typename Function>
ONEBIT_INLINE Lanes map(const Lanes& a, Function f) {
  Lanes y;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) y.part[i] = f(a.part[i]);
  return y;
}

template <typename Function>
ONEBIT_INLINE Lanes map(const Lanes& a, const Lanes& b, Function f) {
  Lanes y;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) y.part[i] = f(a.part[i], b.part[i]);
  return y;
}

ONEBIT_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  return map(a, b, [](Vector x, Vector y) { return x + y; });
}

ONEBIT_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  return map(a, b, [](Vector x, Vector y) { return x * y; });
}

// In each block of 2 * kWidth lanes: lanes [0, kWidth) of a, then of b (kFrom = 0), or [kWidth, 2 * kWidth) of each.
// V is Vector: a parameter, because clang looks into branches for other widths unless their types depend on one.
template <int kWidth, int kFrom, typename V>
ONEBIT_INLINE V gather(V a, V b) {
#define ONEBIT_LANE(i) ((i) / (2 * kWidth) * (2 * kWidth) + (i) % kWidth + kFrom + ((i) / kWidth % 2) * kPartLanes)
#define ONEBIT_LANES4(i) ONEBIT_LANE(i), ONEBIT_LANE(i + 1), ONEBIT_LANE(i + 2), ONEBIT_LANE(i + 3)
#define ONEBIT_LANES8(i) ONEBIT_LANES4(i), ONEBIT_LANES4(i + 4)
#if defined(__clang__)
  if constexpr (sizeof(V) == 64) return __builtin_shufflevector(a, b, ONEBIT_LANES8(0), ONEBIT_LANES8(8));
  if constexpr (sizeof(V) == 32) return __builtin_shufflevector(a, b, ONEBIT_LANES8(0));
  if constexpr (sizeof(V) == 16) return __builtin_shufflevector(a, b, ONEBIT_LANES4(0));
#else
  if constexpr (sizeof(V) == 64) return __builtin_shuffle(a, b, IntVector{ONEBIT_LANES8(0), ONEBIT_LANES8(8)});
  if constexpr (sizeof(V) == 32) return __builtin_shuffle(a, b, IntVector{ONEBIT_LANES8(0)});
  if constexpr (sizeof(V) == 16) return __builtin_shuffle(a, b, IntVector{ONEBIT_LANES4(0)});
#endif
#undef ONEBIT_LANES8
#undef ONEBIT_LANES4
#undef ONEBIT_LANE
}

// One step of two pairwise sums at once: in each block of 2 * kWidth lanes, the first half holds a[l] + a[l + kWidth],
// the second half b[l] + b[l + kWidth].
template <int kWidth>
ONEBIT_INLINE Lanes fold(const Lanes& a, const Lanes& b) {
  Lanes sum;
  ONEBIT_UNROLL
  for (int i = 0; i < kParts; ++i) {
    if constexpr (kWidth >= kPartLanes) {
      constexpr int kStep = kWidth / kPartLanes;
      const Lanes& from = i / kStep % 2 ? b : a;
      const int first = i / (2 * kStep) * (2 * kStep) + i % kStep;
      sum.part[i] = from.part[first] + from.part[first + kStep];
    } else {
      sum.part[i] = gather<kWidth, 0>(a.part[i], b.part[i]) + gather<kWidth, kWidth>(a.part[i], b.part[i]);
    }
  }
  return sum;
}

ONEBIT_INLINE float total(Lanes a) {
  a = fold<8>(a, a);
  a = fold<4>(a, a);
  a = fold<2>(a, a);
  return fold<1>(a, a).part[0][0];
}

// One lane made of all lanes of a register by f, which does not care for their order.
template <typename T, typename Function>
ONEBIT_INLINE auto reduce(T a, Function f) {
  if constexpr (kPartLanes > 8) a = f(a, (T)gather<8, 8>((Vector)a, (Vector)a));
  if constexpr (kPartLanes > 4) a = f(a, (T)gather<4, 4>((Vector)a, (Vector)a));
  a = f(a, (T)gather<2, 2>((Vector)a, (Vector)a));
  return f(a, (T)gather<1, 1>((Vector)a, (Vector)a))[0];
}

// The totals of 16 Lanes, one in each lane. Overwrites a.
ONEBIT_INLINE Lanes totals(Lanes* a) {
  ONEBIT_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = fold<8>(a[i], a[i + 8]);
  ONEBIT_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = fold<4>(a[i], a[i + 4]);
  ONEBIT_UNROLL
  for (int i = 0; i < 2; ++i) a[i] = fold<2>(a[i], a[i + 2]);
  return fold<1>(a[0], a[1]);
}

template <typename Term>
ONEBIT_INLINE float lane_sum(const float* x, int n, Term term) {
  Lanes sum = splat(0.0f);
  int i = 0;
  for (; i + kLaneCount <= n; i += kLaneCount) sum = sum + map(load_lanes(x + i), term);
  if (i < n) sum = sum + map(load_lanes(x + i, n - i), term);
  return total(sum);
}

// ---- Elementwise ----

// The exact sum of one plane, or of two, rounded once.
ONEBIT_INLINE float sum_of(const std::int32_t* acc, const std::int32_t* lo, int j) {
  if (!lo) return static_cast<float>(acc[j]);
  // Exact in double, so the one rounding is the one to float.
  return static_cast<float>(static_cast<double>(acc[j]) * 128.0 + static_cast<double>(lo[j]));
}

// per_row, and whether there is lo, are constants where this is called; so is the absence of x_scale a factor
// of 1, which changes no bit.
ONEBIT_INLINE void scale_row(const std::int32_t* acc, const std::int32_t* lo, const float* w_scale, bool per_row,
                             float x_scale, int n, bool accumulate, float* y) {
  if (accumulate) {
    for (int j = 0; j < n; ++j) y[j] = (y[j] + sum_of(acc, lo, j) * w_scale[per_row ? j : 0]) * x_scale;
  } else {
    for (int j = 0; j < n; ++j) y[j] = (sum_of(acc, lo, j) * w_scale[per_row ? j : 0]) * x_scale;
  }
}

void scale_sums(const std::int32_t* acc, const std::int32_t* lo, std::ptrdiff_t ld_acc, const float* w_scale,
                bool per_row, const float* x_scale, int m, int n, bool accumulate, float* y,
                std::ptrdiff_t ldy) noexcept {
  for (std::ptrdiff_t i = 0; i < m; ++i, y += ldy) {
    const float factor = x_scale ? x_scale[i] : 1.0f;
    const std::int32_t* row = acc + i * ld_acc;
    const std::int32_t* lo_row = lo ? lo + i * ld_acc : nullptr;
    if (lo && per_row) {
      scale_row(row, lo_row, w_scale, true, factor, n, accumulate, y);
    } else if (lo) {
      scale_row(row, lo_row, w_scale, false, factor, n, accumulate, y);
    } else if (per_row) {
      scale_row(row, nullptr, w_scale, true, factor, n, accumulate, y);
    } else {
      scale_row(row, nullptr, w_scale, false, factor, n, accumulate, y);
    }
  }
}

void add(const float* y, int n, float* x) noexcept {
  for (int i = 0; i < n; ++i) x[i] = x[i] + y[i];
}

void rope(float* x, const float* cos, const float* sin, int n_heads, int d_head) noexcept {
  const int half = d_head / 2;
  for (int head = 0; head < n_heads; ++head, x += d_head) {
    for (int i = 0; i < half; ++i) {
      const float a = x[i];
      const float b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

ONEBIT_INLINE std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }

// ---- Gates ----

// y[i] = f(a[i], b[i]), a register at a time.
template <typename Function>
ONEBIT_INLINE void map_values(const float* a, const float* b, int n, float* y, Function f) {
  int i = 0;
  for (; i + kLaneCount <= n; i += kLaneCount) store_lanes(y + i, map(load_lanes(a + i), load_lanes(b + i), f));
  if (i < n) store_lanes(y + i, map(load_lanes(a + i, n - i), load_lanes(b + i, n - i), f), n - i);
}

void relu2_mul(const float* gate, const float* up, int n, float* y) noexcept {
  map_values(gate, up, n, y, [](Vector g, Vector u) {
    const Vector r = g > 0.0f ? g : Vector{};
    return (r * r) * u;
  });
}

// 1.5 * 2^23: a float this large has no bits below 1, so adding it rounds to a whole number, ties to even, and leaves
// that number in its low bits.
constexpr float kRounder = 0x1.8p23f;

// exp(x) as 2^n * exp(r), n = round(x / ln 2). Saturates: 0 below -87, infinity above 88.
ONEBIT_INLINE Vector exponential(Vector x) {
  const Vector shifted = x * 0x1.715476p+0f + kRounder;
  const Vector n = shifted - kRounder;
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const Vector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  // Minimax of (exp(r) - 1 - r) / r^2 over |r| <= ln(2) / 2, relative error 3e-9.
  Vector p = Vector{} + 0x1.6a23dcp-10f;
  p = p * r + 0x1.123a26p-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.55549p-3f;
  p = p * r + 0x1.fffffcp-2f;
  const Vector exp_r = 1.0f + (r + (r * r) * p);
  // The low bits of `shifted` hold n; as an exponent they make 2^n.
  const Vector y = exp_r * (Vector)(((BitsVector)shifted + 127u) << 23);
  const Vector above_zero = x < -87.0f ? Vector{} : y;
  return x > 88.0f ? Vector{} + __builtin_inff() : above_zero;
}

ONEBIT_INLINE float exponential(float x) { return exponential(x - Vector{})[0]; }

void silu_mul(const float* gate, const float* up, int n, float* y) noexcept {
  map_values(gate, up, n, y, [](Vector g, Vector u) { return (g / (1.0f + exponential(-g))) * u; });
}

// ---- Norm and quantisers ----

void rms_norm(const float* x, const float* gain, float eps, int n, float* y) noexcept {
  const float sum = lane_sum(x, n, [](Vector v) { return v * v; });
  const float r = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = (x[i] * r) * gain[i];
}

constexpr float kEpsilon = 1e-5f;

// The largest magnitude, at least `least`; NaN if any value is NaN, because the bits of NaN are above all others.
ONEBIT_INLINE float largest_magnitude(const float* x, int n, float least = kEpsilon) {
  std::uint32_t largest = bits_of(least);
  for (int i = 0; i < n; ++i) {
    const std::uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return __builtin_bit_cast(float, largest);
}

// The mean magnitude, at least epsilon; NaN if any value is NaN.
ONEBIT_INLINE float mean_magnitude(const float* x, int n) {
  const float mean =
      lane_sum(x, n, [](Vector v) { return (Vector)((IntVector)v & 0x7fffffff); }) / static_cast<float>(n);
  return mean < kEpsilon ? kEpsilon : mean;
}

// x to the nearest whole number in [low, high], ties to even; NaN becomes 0.
ONEBIT_INLINE IntVector round_clamped(Vector x, float low, float high) {
  const Vector number = x == x ? x : Vector{};
  const Vector above = number < low ? Vector{} + low : number;
  const Vector clamped = above > high ? Vector{} + high : above;
  return (IntVector)(clamped + kRounder) - (IntVector)(Vector{} + kRounder);
}

ONEBIT_INLINE void store_bytes(std::int8_t* to, IntVector codes) {
  const ByteVector bytes = __builtin_convertvector(codes, ByteVector);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

// codes[i] = f(x[i]), and zeros from n up to n_padded.
template <typename Function>
ONEBIT_INLINE void store_codes(const float* x, int n, int n_padded, std::int8_t* codes, Function f) {
  std::int8_t last[kLaneCount] = {};
  for (int i = 0; i < n; i += kLaneCount) {
    const int count = n - i < kLaneCount ? n - i : kLaneCount;
    const Lanes values = load_lanes(x + i, count);
    std::int8_t* to = count == kLaneCount ? codes + i : last;
    ONEBIT_UNROLL
    for (int part = 0; part < kParts; ++part) {
      store_bytes(to + part * kPartLanes, f(values.part[part]));
    }
    if (count < kLaneCount) __builtin_memcpy(codes + i, last, static_cast<std::size_t>(count));
  }
  for (int i = n; i < n_padded; ++i) codes[i] = 0;
}

void quantize_a8(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  const float largest = largest_magnitude(x, n);
  *scale = largest / 127.0f;
  const float factor = 127.0f / largest;
  store_codes(x, n, n_padded, codes, [=](Vector v) { return round_clamped(v * factor, -127.0f, 127.0f); });
}

void quantize_a4(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  constexpr float kSqrt7 = 0x1.52a7fap+1f;
  const float mean = mean_magnitude(x, n);
  *scale = mean / kSqrt7;
  const float factor = kSqrt7 / mean;
  store_codes(x, n, n_padded, codes, [=](Vector v) { return round_clamped(v * factor, -8.0f, 7.0f); });
}

void quantize_a1(const float* x, int n, int n_padded, std::int8_t* codes, float* scale) noexcept {
  *scale = mean_magnitude(x, n);
  // A true comparison is -1.
  store_codes(x, n, n_padded, codes, [](Vector v) { return (v > 0.0f) * -2 - 1; });
}

// x to the nearest code of a15, in its two planes.
struct Code15 {
  IntVector hi;
  IntVector lo;
};

ONEBIT_INLINE Code15 split15(Vector x) {
  const IntVector code = round_clamped(x, -16256.0f, 16256.0f);
  const IntVector hi = (code + 64) >> 7;
  return {hi, code - (hi << 7)};
}

void quantize_a15(const float* x, int n, int n_padded, std::int8_t* hi, std::int8_t* lo, float* scale) noexcept {
  const float largest = largest_magnitude(x, n);
  const float factor = 16256.0f / largest;
  *scale = largest / 16256.0f;
  store_codes(x, n, n_padded, hi, [=](Vector v) { return split15(v * factor).hi; });
  store_codes(x, n, n_padded, lo, [=](Vector v) { return split15(v * factor).lo; });
}

std::int32_t sum_codes(const std::int8_t* codes, int n) noexcept {
  std::int32_t sum = 0;
  for (int i = 0; i < n; ++i) sum += codes[i];
  return sum;
}

// ---- Numbers of the cache ----

ONEBIT_INLINE Bf16 encode(float x, Bf16) {
  const std::uint32_t bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16)};
}

ONEBIT_INLINE E4M3 encode(float x, E4M3) {
  // Below the smallest normal number, numbers are as far apart as the low bits of this one, so adding it rounds.
  constexpr float kAnchor = 0x1p14f;
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t normal = ((magnitude + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  const std::uint32_t small = bits_of(__builtin_bit_cast(float, magnitude) + kAnchor) - bits_of(kAnchor);
  const std::uint32_t code = magnitude < bits_of(0x1p-6f) ? small : normal < 0x7e ? normal : 0x7e;
  return {static_cast<std::uint8_t>(code | (bits >> 24 & 0x80))};
}

template <typename T>
void to_cache(const float* x, int n, void* y) noexcept {
  T* numbers = static_cast<T*>(y);
  for (int i = 0; i < n; ++i) numbers[i] = encode(x[i], T{});
}

#include "attention.inl"
#include "dots.inl"

// What this file, attention.inl and dots.inl give to a table of Kernels, in the order of its members.
#define ONEBIT_LANE_KERNELS                                                                                       \
  .scale_sums = scale_sums, .quantize_a8 = quantize_a8, .quantize_a4 = quantize_a4, .quantize_a1 = quantize_a1,   \
  .quantize_a15 = quantize_a15, .sum_codes = sum_codes, .rms_norm = rms_norm, .rope = rope, .silu_mul = silu_mul, \
  .relu2_mul = relu2_mul, .add = add, .dot_bf16 = dot_bf16, .to_cache = {to_cache<Bf16>, to_cache<E4M3>},         \
  .attend = {attend<Bf16>, attend<E4M3>}, .merge_splits = merge_splits, .weigh_int8 = weigh_int8, .mix_int8 = mix_int8
