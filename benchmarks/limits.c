// What the machine can do at most: bytes read per second, and int8 multiply-adds per second of each instruction
// that is worth using. Compiled for the machine it runs on by limits.py.
#include <stddef.h>
#include <stdint.h>

// Arrays lie where their owner put them, not always at a multiple of 64 bytes.
typedef uint64_t wide __attribute__((vector_size(64), aligned(8)));

static uint64_t fold(const wide* a) {
  uint64_t x = 0;
  for (int i = 0; i < 8; ++i) x ^= (*a)[i];
  return x;
}

// Both readers take n values of 64 bytes, a multiple of 16. A prefetch reaches `ahead` values further, 0 for none;
// beyond the end it does no harm.
uint64_t read_1_stream(const wide* p, size_t n, size_t ahead) {
  wide a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i < n; i += 4) {
    if (ahead)
      for (size_t j = 0; j < 4; ++j) __builtin_prefetch(p + i + j + ahead);
    a ^= p[i];
    b ^= p[i + 1];
    c ^= p[i + 2];
    d ^= p[i + 3];
  }
  a ^= b ^ c ^ d;
  return fold(&a);
}

uint64_t read_4_streams(const wide* p, size_t n, size_t ahead) {
  const size_t part = n / 4;
  wide a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i < part; ++i) {
    if (ahead)
      for (size_t j = 0; j < 4; ++j) __builtin_prefetch(p + i + j * part + ahead);
    a ^= p[i];
    b ^= p[i + part];
    c ^= p[i + 2 * part];
    d ^= p[i + 3 * part];
  }
  a ^= b ^ c ^ d;
  return fold(&a);
}

// Each peak function runs `rounds` rounds of independent instructions on registers and returns how many int8
// multiply-adds that were, 0 where the machine lacks the instruction. Assembly, for compilers spill such loops.
#define REPEAT_4(X) X(0) X(1) X(2) X(3)
#define REPEAT_8(X) REPEAT_4(X) X(4) X(5) X(6) X(7)
#define REPEAT_16(X) REPEAT_8(X) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

#if defined(__AVX512VNNI__)
#include <immintrin.h>
const char* dot_name(void) { return "AVX-512 VNNI, vpdpbusd zmm"; }
uint64_t dot_peak(uint64_t rounds) {
  __m512i acc[16], x = _mm512_set1_epi8(1);
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
  for (uint64_t r = 0; r < rounds; ++r) {
#define DOT(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(acc[i]) : "v"(x));
    REPEAT_16(DOT)
  }
  return rounds * 16 * 64;
}
#elif defined(__AVXVNNI__)
#include <immintrin.h>
const char* dot_name(void) { return "AVX-VNNI, vpdpbusd ymm"; }
uint64_t dot_peak(uint64_t rounds) {
  __m256i acc[8], x = _mm256_set1_epi8(1);
  for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_si256();
  for (uint64_t r = 0; r < rounds; ++r) {
#define DOT(i) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(acc[i]) : "x"(x));
    REPEAT_8(DOT)
  }
  return rounds * 8 * 32;
}
#elif defined(__AVX2__)
#include <immintrin.h>
const char* dot_name(void) { return "AVX2, vpmaddubsw + vpaddw"; }
uint64_t dot_peak(uint64_t rounds) {
  __m256i acc[8], x = _mm256_set1_epi8(1);
  for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_si256();
  for (uint64_t r = 0; r < rounds; ++r) {
#define DOT(i)                                                        \
  {                                                                   \
    __m256i product;                                                  \
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0"     \
                     : "+x"(acc[i]), "=&x"(product)                   \
                     : "x"(x));                                       \
  }
    REPEAT_8(DOT)
  }
  return rounds * 8 * 32;
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
const char* dot_name(void) { return "i8mm, smmla"; }
uint64_t dot_peak(uint64_t rounds) {
  int32x4_t acc[16];
  int8x16_t x = vdupq_n_s8(1);
  for (int i = 0; i < 16; ++i) acc[i] = vdupq_n_s32(0);
  for (uint64_t r = 0; r < rounds; ++r) {
#define DOT(i) __asm__ volatile("smmla %0.4s, %1.16b, %1.16b" : "+w"(acc[i]) : "w"(x));
    REPEAT_16(DOT)
  }
  return rounds * 16 * 32;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
const char* dot_name(void) { return "dot product, sdot"; }
uint64_t dot_peak(uint64_t rounds) {
  int32x4_t acc[16];
  int8x16_t x = vdupq_n_s8(1);
  for (int i = 0; i < 16; ++i) acc[i] = vdupq_n_s32(0);
  for (uint64_t r = 0; r < rounds; ++r) {
#define DOT(i) __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(acc[i]) : "w"(x));
    REPEAT_16(DOT)
  }
  return rounds * 16 * 16;
}
#else
const char* dot_name(void) { return "none"; }
uint64_t dot_peak(uint64_t rounds) { return 0 * rounds; }
#endif

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
uint64_t amx_peak(uint64_t rounds) {
  // The system lends the tiles to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;
  struct __attribute__((packed)) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  for (uint64_t r = 0; r < rounds; ++r)
    __asm__ volatile(
        "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\ttdpbusd %%tmm7, %%tmm5, %%tmm3" ::);
  __asm__ volatile("tilerelease" ::);
  return rounds * 4 * 16 * 16 * 64;
}
#else
uint64_t amx_peak(uint64_t rounds) { return 0 * rounds; }
#endif
