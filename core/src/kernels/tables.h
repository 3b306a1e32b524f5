// The kernel tables; core/CMakeLists.txt decides which of them a build contains. Each is the only symbol that its file
// exports.
#pragma once

#include "onebit/kernels.h"

namespace onebit {

extern const Kernels kScalar;
extern const Kernels kAmx;
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvxVnni;
extern const Kernels kNeonDotprod;
extern const Kernels kNeonI8mm;

}  // namespace onebit
