#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>

#include "types.h"
#define NAME(x) x##_avx512
#include "lanes_avx512.h"
#include "kernels.h"
#endif
