// The kernel tables that a build may contain. Each is the only symbol that its file exports.
#pragma once

#include "onebit/kernels.h"

namespace onebit {

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#endif

}  // namespace onebit
