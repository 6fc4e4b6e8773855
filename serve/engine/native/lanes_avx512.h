/* Sixteen float32 lanes in one AVX-512 register. */
#define MAX_ROWS 6 /* rows of a tile: 6 x 4 registers of sums, 4 of weights, 1 of activations: 29 of 32 */
#define MAX_PANELS 4

typedef __m512 vf;

static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf v_all(float a) { return _mm512_set1_ps(a); }
static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void v_store_half(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
/* The second argument where either is NaN. */
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float v_largest(vf a) { return _mm512_reduce_max_ps(a); }
/* a * 2^n for whole n. */
static inline vf v_scale(vf a, vf n) { return _mm512_scalef_ps(a, n); }
/* Lane i is what `op` makes of the lanes of a[i], in halves. */
#define ACROSS(name, op)                                                                                              \
    static inline __attribute__((always_inline)) vf name(const vf a[LANES]) {                                         \
        vf pairs[8], fours[4], eights[2];                                                                             \
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) pairs[i] =                                                \
            op(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));               \
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {                                                         \
            const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);                 \
            fours[i] = op(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));    \
        }                                                                                                             \
        _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) eights[i] =                                               \
            op(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),                                            \
               _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));                                           \
        return op(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd)); \
    }
ACROSS(v_sums, v_add)
ACROSS(v_maxima, v_max)
#undef ACROSS
/* The first `count` lanes of a, else b. */
static inline vf v_first(int64_t count, vf a, vf b) {
    return _mm512_mask_blend_ps((__mmask16)((1u << count) - 1), b, a);
}
