/* Sixteen float32 lanes in two AVX2 registers: the counterpart of lanes_avx512.h. */
#define MAX_ROWS 6 /* rows of a tile: 6 x 2 registers of sums, 2 of weights, 1 of activations: 15 of 16 */
#define MAX_PANELS 1

typedef struct {
    __m256 a, b;
} vf;

#define BOTH(name, op)                                                                                                \
    static inline vf name(vf x, vf y) { return (vf){op(x.a, y.a), op(x.b, y.b)}; }

static inline vf v_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void v_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline vf v_all(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf v_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf v_half(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline void v_store_half(uint16_t *p, vf x) {
    const int mode = _MM_FROUND_TO_NEAREST_INT;
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, mode));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, mode));
}
static inline vf v_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
BOTH(v_add, _mm256_add_ps)
BOTH(v_sub, _mm256_sub_ps)
BOTH(v_mul, _mm256_mul_ps)
BOTH(v_div, _mm256_div_ps)
/* The second argument where either is NaN. */
BOTH(v_max, _mm256_max_ps)
BOTH(v_min, _mm256_min_ps)
static inline vf v_abs(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline vf v_round(vf x) {
    const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return (vf){_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
static inline float v_sum(vf x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    t = _mm_add_ss(t, _mm_movehdup_ps(t));
    return _mm_cvtss_f32(t);
}
static inline float v_largest(vf x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    t = _mm_max_ss(t, _mm_movehdup_ps(t));
    return _mm_cvtss_f32(t);
}
/* 2^n of whole n within -126..127, as the exponent's bits. */
static inline __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline vf v_scale(vf x, vf n) {
    return (vf){_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
#undef BOTH
static inline __m256 sums_of_eight(const vf *a) {
    __m256 one[8];
    for (int i = 0; i < 8; i++) one[i] = _mm256_add_ps(a[i].a, a[i].b);
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(one[0], one[1]), _mm256_hadd_ps(one[2], one[3]));
    const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(one[4], one[5]), _mm256_hadd_ps(one[6], one[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
/* Lane i is the sum of the lanes of a[i]. */
static inline vf v_sums(const vf a[LANES]) { return (vf){sums_of_eight(a), sums_of_eight(a + 8)}; }
/* The first `count` lanes of a, else b. */
static inline vf v_first(int64_t count, vf a, vf b) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), most = _mm256_set1_epi32((int)count);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return (vf){_mm256_blendv_ps(b.a, a.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, low))),
                _mm256_blendv_ps(b.b, a.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, high)))};
}
