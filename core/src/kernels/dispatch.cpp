// Chooses among the kernel tables: one ordered list, the first that this CPU runs, and runs rightly, wins.
//
// To add an instruction set: one file, its flags in core/CMakeLists.txt, its declaration in tables.h, one line in
// kCandidates.
#include <cstring>

#if defined(ONEBIT_X86_64_KERNELS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(ONEBIT_AARCH64_KERNELS)
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

#include "tables.h"

namespace onebit {
namespace {

struct Candidate {
  const Kernels* table;
  bool (*is_supported)() noexcept;
};

bool always() noexcept { return true; }

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#if defined(ONEBIT_X86_64_KERNELS)
bool has_avx2() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

bool has_avx512vnni() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avxvnni() noexcept {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Tile registers are 8 KB of state per thread: Linux gives them to processes that ask, once for all threads.
bool has_amx() noexcept {
#if defined(__linux__)
  constexpr int kRequestState = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512vnni() && __builtin_cpu_supports("avx512vbmi") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d >> 24 & 1) && (d >> 25 & 1) && syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// User programs may not ask an ARM CPU what it has; each system tells in its own way.
#if defined(ONEBIT_AARCH64_KERNELS)
#if defined(__APPLE__)
bool has_feature(const char* name) noexcept {
  int value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

bool has_neon_dotprod() noexcept {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  return has_feature("hw.optional.arm.FEAT_DotProd");
#elif defined(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE)
  return IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE);
#else
  return false;
#endif
}

bool has_neon_i8mm() noexcept {
  if (!has_neon_dotprod()) return false;
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#elif defined(__APPLE__)
  return has_feature("hw.optional.arm.FEAT_I8MM");
#elif defined(PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE)
  return IsProcessorFeaturePresent(PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE);
#else
  return false;
#endif
}
#endif

// Best first.
constexpr Candidate kCandidates[] = {
#if defined(ONEBIT_X86_64_KERNELS)
    {&kAmx, has_amx},
    {&kAvx512Vnni, has_avx512vnni},
    {&kAvxVnni, has_avxvnni},
    {&kAvx2, has_avx2},
#endif
#if defined(ONEBIT_AARCH64_KERNELS)
    {&kNeonI8mm, has_neon_i8mm},
    {&kNeonDotprod, has_neon_dotprod},
#endif
    {&kScalar, always},
};

constexpr int kCandidateCount = static_cast<int>(sizeof kCandidates / sizeof *kCandidates);

struct Tables {
  const Kernels* available[kCandidateCount];
  const Kernels* broken[kCandidateCount];
  int n_available = 0;
  int n_broken = 0;

  Tables() noexcept {
    for (const Candidate& candidate : kCandidates) {
      if (!candidate.is_supported()) continue;
      // The scalar table is the measure, and always there.
      const bool is_right = candidate.table == &kScalar || self_test(kScalar, *candidate.table, nullptr, 0) == 0;
      (is_right ? available[n_available++] : broken[n_broken++]) = candidate.table;
    }
  }
};

// Found out once, when first asked for: the CPU does not change.
const Tables& tables() noexcept {
  static const Tables found;
  return found;
}

int copy(const Kernels* const* from, int n, const Kernels** to, int capacity) noexcept {
  for (int i = 0; i < n && i < capacity; ++i) to[i] = from[i];
  return n;
}

}  // namespace

int available_kernels(const Kernels** to, int capacity) noexcept {
  return copy(tables().available, tables().n_available, to, capacity);
}

int broken_kernels(const Kernels** to, int capacity) noexcept {
  return copy(tables().broken, tables().n_broken, to, capacity);
}

const Kernels* find_kernels(const char* name) noexcept {
  for (int i = 0; i < tables().n_available; ++i) {
    if (std::strcmp(tables().available[i]->name, name) == 0) return tables().available[i];
  }
  return nullptr;
}

}  // namespace onebit
