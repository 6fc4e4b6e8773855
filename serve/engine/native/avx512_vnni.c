#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>

#include "types.h"
#define WITH_VNNI
#define NAME(x) x##_avx512_vnni
#include "lanes_avx512.h"
#include "kernels.h"
#endif
