#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "types.h"
#define NAME(x) x##_avx2
#include "lanes_avx2.h"
#include "kernels.h"
#endif
