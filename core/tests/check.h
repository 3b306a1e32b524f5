// The few lines of a test framework that the C++ tests need: they hold what Python cannot reach, and run under the
// sanitizers.
#pragma once

#include <cstdio>

inline int n_failed_checks = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      ++n_failed_checks;                                                       \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
    }                                                                          \
  } while (false)
