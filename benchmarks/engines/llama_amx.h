// Put before every file of llama.cpp by `make bench`. GCC 12 says of its _tile_loadconfig that it reads 8 bytes, and
// drops the stores to the other 56 as dead: the AMX kernels of llama.cpp then configure their tiles with garbage and crash.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
