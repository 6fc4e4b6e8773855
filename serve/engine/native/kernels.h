/* The kernels, written once over sixteen lanes and compiled for each instruction set: avx2.c, avx512.c and
 * avx512_vnni.c include this after their lanes. What each product and each attention computes for a row does not depend
 * on the other rows of the batch, nor on the number of threads, bit for bit: every sum is taken in one order. */

#define BARRIER                                                                                                       \
    meet(team);                                                                                                       \
    spent(team, WAITING);

static inline vf NAME(exponential)(vf x) {
    /* NaN stays NaN: v_min and v_max return their second argument then. */
    x = v_max(v_all(-87.0f), v_min(v_all(88.0f), x));
    const vf n = v_round(v_mul(x, v_all(1.44269504f)));
    vf r = v_fma(n, v_all(-0.693359375f), x); /* ln 2 in two parts */
    r = v_fma(n, v_all(2.12194440e-4f), r);
    vf p = v_fma(v_all(1.9875691500e-4f), r, v_all(1.3981999507e-3f)); /* Cephes' polynomial: 2e-7 relative */
    p = v_fma(p, r, v_all(8.3334519073e-3f));
    p = v_fma(p, r, v_all(4.1665795894e-2f));
    p = v_fma(p, r, v_all(1.6666665459e-1f));
    p = v_fma(p, r, v_all(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_all(1.0f)));
    return v_scale(p, n);
}

static inline vf NAME(activate)(int64_t activation, vf x) {
    if (activation == RELU) return v_max(v_zero(), x);
    vf z = x; /* SiLU: x sigmoid(x) */
    if (activation == GELU_TANH) { /* x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same as by tanh */
        const vf square = v_mul(x, x);
        z = v_mul(x, v_fma(square, v_all(2.0f * 0.7978845608f * 0.044715f), v_all(2.0f * 0.7978845608f)));
    }
    return v_div(x, v_add(v_all(1.0f), NAME(exponential)(v_sub(v_zero(), z))));
}

/* out [count] = the activation of x; gated: times what lies `apart` from it. */
static void NAME(activate_row)(int64_t activation, int64_t gated, const float *x, int64_t apart, int64_t count,
                               float *out) {
    for (int64_t k = 0; k < count; k += LANES) {
        vf value = NAME(activate)(activation, v_load(x + k));
        if (gated) value = v_mul(value, v_load(x + apart + k));
        v_store(out + k, value);
    }
}

static void NAME(normalize)(const float *x, const float *weight, float epsilon, int64_t width, float *out) {
    vf sum = v_zero();
    for (int64_t k = 0; k < width; k += LANES) {
        const vf v = v_load(x + k);
        sum = v_fma(v, v, sum);
    }
    const vf inverse = v_all(1.0f / sqrtf(v_sum(sum) / (float)width + epsilon));
    for (int64_t k = 0; k < width; k += LANES)
        v_store(out + k, v_mul(v_mul(v_load(x + k), inverse), v_load(weight + k)));
}

/* The part of the next block that a tile brings into the cache: `lines` of 64 bytes at every step of its sums. */
#define FETCH_AHEAD(step)                                                                                             \
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(ahead + ((step) * lines + line) * 64, 0, 2);

/* -- products with float weights ------------------------------------------------------------------------------------
 * Weights lie in blocks of 64 outputs: [blocks][inputs][64]. A tile is up to MAX_ROWS rows by `panels` x 16 outputs. */

static inline __attribute__((always_inline)) void NAME(float_tile)(
    const int rows, const int panels, const int half, const int add, const float *x, int64_t x_step,
    const char *weight, const char *ahead, int64_t lines, int64_t inputs, float *out, int64_t out_step) {
    vf sums[MAX_ROWS][4];
    const int size = half ? 2 : 4;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) sums[r][p] = v_zero();
    for (int64_t k = 0; k < inputs; k++) {
        const char *w = weight + k * BLOCK * size;
        vf part[4];
        FETCH_AHEAD(k)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
            part[p] = half ? v_half((const uint16_t *)w + p * LANES) : v_load((const float *)w + p * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const vf one = v_all(x[r * x_step + k]);
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) sums[r][p] = v_fma(one, part[p], sums[r][p]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            float *to = out + r * out_step + p * LANES;
            v_store(to, add ? v_add(v_load(to), sums[r][p]) : sums[r][p]);
        }
}

/* How many panels a tile of so many rows takes, so that its sums stay in registers. Where they do not fit together the
 * weights of a block are read more than once, which is good only as long as they are in the cache. */
#if MAX_PANELS == 4
#define FLOAT_PANELS(rows) 4
#else
#define FLOAT_PANELS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#endif

#define FLOAT_ROWS(rows)                                                                                              \
    case rows:                                                                                                        \
        for (int p = 0; p < 4; p += FLOAT_PANELS(rows))                                                               \
            NAME(float_tile)(rows, FLOAT_PANELS(rows), half, add, x, x_step, weight + p * LANES * (half ? 2 : 4),     \
                             ahead, p == 0 ? lines : 0, inputs, out + p * LANES, out_step);                           \
        break;

static inline __attribute__((always_inline)) void NAME(float_rows)(
    const int half, const int add, int64_t rows, const float *x, int64_t x_step, const char *weight,
    const char *ahead, int64_t lines, int64_t inputs, float *out, int64_t out_step) {
    switch (rows) {
        FLOAT_ROWS(1)
        FLOAT_ROWS(2)
        FLOAT_ROWS(3)
        FLOAT_ROWS(4)
        FLOAT_ROWS(5)
        FLOAT_ROWS(6)
    }
}

static void NAME(float32_rows)(int64_t add, int64_t rows, const float *x, int64_t x_step, const char *w,
                               const char *ahead, int64_t lines, int64_t inputs, float *out, int64_t out_step) {
    if (add) NAME(float_rows)(0, 1, rows, x, x_step, w, ahead, lines, inputs, out, out_step);
    else NAME(float_rows)(0, 0, rows, x, x_step, w, ahead, lines, inputs, out, out_step);
}

static void NAME(float16_rows)(int64_t add, int64_t rows, const float *x, int64_t x_step, const char *w,
                               const char *ahead, int64_t lines, int64_t inputs, float *out, int64_t out_step) {
    if (add) NAME(float_rows)(1, 1, rows, x, x_step, w, ahead, lines, inputs, out, out_step);
    else NAME(float_rows)(1, 0, rows, x, x_step, w, ahead, lines, inputs, out, out_step);
}

/* out [rows, LANES * panels] = x W^T of the first of a float32 block's panels: less than a block. */
#define NARROW(rows, panels)                                                                                          \
    case 4 * (rows) + (panels):                                                                                       \
        for (int p = 0; p < panels; p += MAX_PANELS == 4 ? panels : 1)                                                \
            NAME(float_tile)(rows, MAX_PANELS == 4 ? panels : 1, 0, 0, x, x_step, weight + p * LANES * 4, NULL, 0,    \
                             inputs, out + p * LANES, out_step);                                                      \
        break;
#define NARROW_ROWS(rows) NARROW(rows, 1) NARROW(rows, 2) NARROW(rows, 3)

static void NAME(narrow)(int64_t panels, int64_t rows, const float *x, int64_t x_step, const char *weight,
                         int64_t inputs, float *out, int64_t out_step) {
    switch (4 * rows + panels) {
        NARROW_ROWS(1)
        NARROW_ROWS(2)
        NARROW_ROWS(3)
        NARROW_ROWS(4)
        NARROW_ROWS(5)
        NARROW_ROWS(6)
    }
}

/* -- products with int16 weights --------------------------------------------------------------------------------------
 * Both factors are -8191..8191: weights with a scale an output, activations with one for each GROUP of a row. Sums of a
 * group are integers, so exact; those of groups are float32. A group whose largest number would cost its neighbours
 * their last bits (T5's `wo` gets some a thousand times the others) is *uneven*: what rounding leaves over of it is
 * multiplied, too. Weights lie as [blocks][inputs / 2][64][2]. Only with VNNI: else float weights are as fast. */

#ifdef WITH_VNNI
static void NAME(groups)(const float *x, int64_t count, vf *largest, vf *sum, vf *check) {
    vf most[LANES], sums[LANES];
    for (int64_t group = 0; group < LANES; group++) {
        const vf low = group < count ? v_load(x + group * GROUP) : v_zero();
        const vf high = group < count ? v_load(x + group * GROUP + LANES) : v_zero();
        *check = v_fma(low, v_zero(), v_fma(high, v_zero(), *check));
        most[group] = v_max(v_abs(low), v_abs(high));
        sums[group] = v_add(v_abs(low), v_abs(high));
    }
    *largest = v_maxima(most);
    *sum = v_sums(sums);
}

/* `x` [width] in levels, `rest` what these leave over of uneven groups, in levels of 1/16382. Both with scales, that of
 * an even group's rest is 0; all are NaN where the row is not finite. Before the rests' scales: how many are uneven. */
static void NAME(quantize16)(const float *x, int64_t width, int16_t *levels, int16_t *rest, float *scales,
                             float *rest_scales) {
    const int64_t groups = width / GROUP;
    vf check = v_zero(), others = v_zero();
    for (int64_t first = 0; first < groups; first += LANES) {
        const int64_t count = groups - first < LANES ? groups - first : LANES;
        vf largest, sum;
        NAME(groups)(x + first * GROUP, count, &largest, &sum, &check);
        others = v_add(others, v_sub(sum, largest));
        _mm512_mask_storeu_ps(scales + first, (__mmask16)((1u << count) - 1), largest);
    }
    /* A multiple of the mean magnitude, each group's largest left out. */
    const float limit = v_sum(others) * (float)UNEVEN / (float)(groups * (GROUP - 1)), broken = v_sum(check);
    int64_t count = 0;
    for (int64_t group = 0; group < groups; group++) {
        const float largest = scales[group] > 1e-30f ? scales[group] : 1e-30f;
        const vf factor = v_all(INT16_MOST / largest);
        const int uneven = limit > 0.0f && largest > limit;
        for (int64_t k = group * GROUP; k < (group + 1) * GROUP; k += LANES) {
            const vf exact = v_mul(v_load(x + k), factor);
            const __m512i whole = _mm512_cvtps_epi32(exact);
            _mm256_storeu_si256((__m256i *)(levels + k), _mm512_cvtepi32_epi16(whole));
            if (!uneven) continue;
            const vf left = v_mul(v_sub(exact, _mm512_cvtepi32_ps(whole)), v_all(2.0f * INT16_MOST));
            _mm256_storeu_si256((__m256i *)(rest + k), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(left)));
        }
        scales[group] = largest * (1.0f / INT16_MOST) + broken;
        rest_scales[group] = uneven ? scales[group] * (0.5f / INT16_MOST) : 0.0f;
        count += uneven;
    }
    rest_scales[-1] = (float)count;
}

static inline __attribute__((always_inline)) void NAME(int16_tile)(
    const int rows, const int add, const uint8_t *x, int64_t x_step, const float *x_scales, int64_t scales_step,
    const int16_t *weight, const char *ahead, int64_t lines, const float *scales, int64_t inputs, float *out,
    int64_t out_step) {
    vf totals[INT_ROWS_MAX][4]; /* in memory, which costs little once a group */
    for (int64_t group = 0; group < inputs / GROUP; group++) {
        __m512i sums[INT_ROWS_MAX][4];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) sums[r][p] = _mm512_setzero_si512();
        for (int64_t k = group * GROUP; k < (group + 1) * GROUP; k += 2) {
            __m512i part[4];
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) part[p] = _mm512_loadu_si512(weight + k * BLOCK + p * 32);
            FETCH_AHEAD(k / 2)
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, x + r * x_step + k * 2, 4);
                const __m512i one = _mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int p = 0; p < 4; p++) /* as the intrinsic, for which GCC 12 copies every sum to and fro */
                    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[r][p]) : "v"(one), "v"(part[p]));
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const vf scale = v_all(x_scales[r * scales_step + group]);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const vf sum = _mm512_cvtepi32_ps(sums[r][p]);
                totals[r][p] = group == 0 ? v_mul(sum, scale) : v_fma(sum, scale, totals[r][p]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            float *to = out + r * out_step + p * LANES;
            const vf scale = v_load(scales + p * LANES);
            v_store(to, add ? v_fma(totals[r][p], scale, v_load(to)) : v_mul(totals[r][p], scale));
        }
}

#define INT16_ROWS(rows)                                                                                              \
    case rows:                                                                                                        \
        NAME(int16_tile)(rows, add, x, x_step, x_scales, scales_step, weight, ahead, lines, scales, inputs, out,      \
                         out_step);                                                                                   \
        break;

static void NAME(int16_rows)(int add, int64_t rows, const uint8_t *x, int64_t x_step, const float *x_scales,
                             int64_t scales_step, const int16_t *weight, const char *ahead, int64_t lines,
                             const float *scales, int64_t inputs, float *out, int64_t out_step) {
    switch (rows) {
        INT16_ROWS(1)
        INT16_ROWS(2)
        INT16_ROWS(3)
        INT16_ROWS(4)
        INT16_ROWS(5)
        INT16_ROWS(6)
    }
}

/* Add what rounding left over of a row's uneven groups. */
static void NAME(int16_rest)(const uint8_t *rest, const float *rest_scales, const int16_t *weight, const float *scales,
                             int64_t inputs, float *out) {
    const int64_t groups = rest_scales[-1] == 0.0f ? 0 : inputs / GROUP;
    for (int64_t first = 0; first < groups; first += LANES) {
        const __mmask16 known = (__mmask16)(groups - first < LANES ? (1u << (groups - first)) - 1 : 0xffff);
        const vf some = _mm512_maskz_loadu_ps(known, rest_scales + first);
        for (uint32_t left = _mm512_cmp_ps_mask(some, v_zero(), _CMP_NEQ_UQ); left != 0; left &= left - 1) {
            const int64_t group = first + __builtin_ctz(left);
            const int16_t *w = weight + group * GROUP * BLOCK;
            NAME(int16_tile)(1, 1, rest + group * GROUP * 2, 0, rest_scales + group, 0, w, NULL, 0, scales, GROUP, out,
                             0);
        }
    }
}
#endif

/* -- products with int8 weights -------------------------------------------------------------------------------------
 * A row is divided by its largest magnitude and rounded to -127..127, plus 128; weights lie as [blocks][inputs / 4][64]
 * [4]. Sums are integers, so exact in any order. Only with VNNI, which sums four products in 32 bits. */

#ifdef WITH_VNNI
/* `x` in levels as bytes, `rest` (or NULL) what that leaves over in levels of 1/254; returns the largest magnitude,
 * NaN where the row is not finite. */
static float NAME(quantize)(const float *x, int64_t width, uint8_t *levels, uint8_t *rest) {
    vf most = v_zero(), check = v_zero();
    for (int64_t k = 0; k < width; k += LANES) {
        const vf v = v_load(x + k);
        most = v_max(most, v_abs(v));
        check = v_fma(v, v_zero(), check);
    }
    const float largest = v_largest(most);
    const vf factor = v_all(largest > 1e-30f ? 127.0f / largest : 0.0f);
    const __m512i shift = _mm512_set1_epi32(128);
    for (int64_t k = 0; k < width; k += LANES) {
        const vf exact = v_mul(v_load(x + k), factor), whole = v_round(exact);
        _mm_storeu_si128((__m128i *)(levels + k),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(whole), shift)));
        if (rest != NULL) {
            const vf left = v_mul(v_sub(exact, whole), v_all(254.0f));
            _mm_storeu_si128((__m128i *)(rest + k),
                             _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(left), shift)));
        }
    }
    return largest + v_sum(check);
}

static inline __attribute__((always_inline)) void NAME(int8_tile)(
    const int rows, const int panels, const int add, const uint8_t *x, int64_t x_step,
    const int8_t *weight, const char *ahead, int64_t lines, const int32_t *offsets, const float *scales, int64_t inputs,
    float unit, const float *largest, int64_t largest_step, float *out, int64_t out_step) {
    __m512i sums[INT_ROWS_MAX][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) sums[r][p] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4) {
        const int8_t *w = weight + k * BLOCK;
        __m512i part[4];
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) part[p] = _mm512_loadu_si512(w + p * 64);
        FETCH_AHEAD(k / 4)
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * x_step + k, 4);
            const __m512i one = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) 
                /* As the intrinsic, for which GCC 12 copies every sum to and fro. */
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[r][p]) : "v"(one), "v"(part[p]));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const vf row = v_all(largest[r * largest_step] * unit);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            float *to = out + r * out_step + p * LANES;
            const __m512i whole = _mm512_sub_epi32(sums[r][p], _mm512_loadu_si512(offsets + p * LANES));
            const vf value = v_mul(v_mul(_mm512_cvtepi32_ps(whole), v_load(scales + p * LANES)), row);
            v_store(to, add ? v_add(v_load(to), value) : value);
        }
    }
}

#define INT8_ROWS(rows)                                                                                               \
    case rows:                                                                                                        \
        NAME(int8_tile)(rows, 4, add, x, x_step, weight, ahead, lines, offsets, scales, inputs, unit, largest,        \
                        largest_step, out, out_step);                                                                 \
        break;

static void NAME(int8_rows)(int add, int64_t rows, const uint8_t *x, int64_t x_step, const int8_t *weight,
                            const char *ahead, int64_t lines, const int32_t *offsets, const float *scales,
                            int64_t inputs, float unit, const float *largest, int64_t largest_step, float *out,
                            int64_t out_step) {
    switch (rows) {
        INT8_ROWS(1)
        INT8_ROWS(2)
        INT8_ROWS(3)
        INT8_ROWS(4)
        INT8_ROWS(5)
        INT8_ROWS(6)
    }
}
#endif

/* One thread's share of out [rows, outputs] (+)= x W^T: blocks `first`..`last` - 1 of 64 outputs, of all rows.
 * `padded` outputs are written; out_step leaves room for them. Integer layers read `quantized`, rows as integers. */
static void NAME(product)(const Linear *linear, const float *x, int64_t x_step, const Quantized *quantized,
                          int64_t rows, int64_t first, int64_t last, int add, float *out, int64_t out_step) {
    const int64_t inputs = linear->inputs, most = linear->kind >= INT16 ? INT_ROWS_MAX : MAX_ROWS;
    const int64_t pieces = (rows + most - 1) / most;
    const int64_t size = linear->kind == FLOAT32 ? 4 : linear->kind >= INT8 ? 1 : 2;
    const int64_t bytes = BLOCK * inputs * size; /* of a block: each step of a tile reads so many lines of it */
    const int64_t step_lines = linear->kind == FLOAT16 ? 2 : 4, slice = (step_lines + pieces - 1) / pieces;
    const int64_t slots = step_lines / slice;
    for (int64_t block = first; block < last; block++) {
        const char *weight = (const char *)linear->weight + block * bytes;
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t from = rows * piece / pieces, count = rows * (piece + 1) / pieces - from;
            float *to = out + from * out_step + block * BLOCK;
            /* The next block comes into the cache meanwhile, a slice of it with each of some pieces. */
            const int64_t slot = piece * slots / pieces, begins = piece == 0 || slot != (piece - 1) * slots / pieces;
            const int64_t lines = begins && block + 1 < last ? slice : 0;
            const char *ahead = weight + bytes + slot * (bytes / slots);
            if (linear->kind == FLOAT32)
                NAME(float32_rows)(add, count, x + from * x_step, x_step, weight, ahead, lines, inputs, to, out_step);
            else if (linear->kind == FLOAT16)
                NAME(float16_rows)(add, count, x + from * x_step, x_step, weight, ahead, lines, inputs, to, out_step);
#ifdef WITH_VNNI
            else if (linear->kind == INT16) {
                const uint8_t *levels = quantized->levels + from * quantized->step;
                const float *scales = quantized->scales + from * quantized->scales_step;
                const float *w_scales = linear->scales + block * BLOCK;
                NAME(int16_rows)(add, count, levels, quantized->step, scales, quantized->scales_step,
                                 (const int16_t *)weight, ahead, lines, w_scales, inputs, to, out_step);
                for (int64_t row = 0; row < count; row++)
                    NAME(int16_rest)(levels + row * quantized->step + quantized->step / 2,
                                     scales + row * quantized->scales_step + quantized->scales_step / 2,
                                     (const int16_t *)weight, w_scales, inputs, to + row * out_step);
            }
            else {
                const int8_t *w = (const int8_t *)weight;
                const int32_t *offsets = linear->offsets + block * BLOCK;
                const uint8_t *levels = quantized->levels + from * quantized->step;
                const float *scales = linear->scales + block * BLOCK;
                const float *largest = quantized->scales + from * quantized->scales_step;
                NAME(int8_rows)(add, count, levels, quantized->step, w, ahead, lines, offsets, scales, inputs,
                                1.0f / 127.0f, largest, quantized->scales_step, to, out_step);
                if (linear->kind == INT8_FINE)
                    NAME(int8_rows)(1, count, levels + quantized->step / 2, quantized->step, w, NULL, 0, offsets,
                                    scales, inputs, 1.0f / (127.0f * 254.0f), largest, quantized->scales_step, to,
                                    out_step);
            }
#else
            (void)quantized;
#endif
        }
    }
}

/* -- attention of one head of one sequence ---------------------------------------------------------------------------
 * keys, values [length, d_kv] as they lie in the cache, whose rows have room for a multiple of LANES; `bias` (or NULL)
 * [max_distance + 1] by distance from the query, which stands at the last position: the farthest first. `scores` has
 * room for `length` rounded up. `next` is where the next keys are: fetched meanwhile, since each head's are too short
 * for the processor to see them coming. */

#define CACHED(p) (half ? v_half((const uint16_t *)(p)) : v_load((const float *)(p)))
#define FETCH(p)                                                                                                      \
    for (int64_t line = 0; line < d_kv * size; line += 64) __builtin_prefetch((p) + line, 0, 3)

static inline __attribute__((always_inline)) void NAME(attend_over)(
    const int half, const float *q, const char *keys, const char *values, const char *next, int64_t length,
    int64_t d_kv, const float *bias, int64_t max_distance, float *scores, float *out) {
    const int64_t parts = d_kv / LANES, size = half ? 2 : 4;
    vf query[MAX_PARTS], sums[2][MAX_PARTS], most = v_all(-INFINITY), total = v_zero();
    for (int64_t p = 0; p < parts; p++) query[p] = v_load(q + p * LANES);
    for (int64_t t = 0; t < length; t += LANES) {
        vf products[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const char *key = keys + (t + i) * d_kv * size;
            FETCH(values + (t + i) * d_kv * size);
            products[i] = v_mul(query[0], CACHED(key));
            for (int64_t p = 1; p < parts; p++)
                products[i] = v_fma(query[p], CACHED(key + p * LANES * size), products[i]);
        }
        vf score = v_sums(products);
        if (bias != NULL) {
            const int64_t farthest = length - 1 - t; /* the distance of the first lane */
            if (farthest <= max_distance && t + LANES <= length)
                score = v_add(score, v_load(bias + max_distance - farthest));
            else {
                float biases[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    const int64_t distance = farthest - i;
                    biases[i] = distance < 0 ? 0.0f : bias[distance < max_distance ? max_distance - distance : 0];
                }
                score = v_add(score, v_load(biases));
            }
        }
        if (t + LANES > length) score = v_first(length - t, score, v_all(-INFINITY));
        most = v_max(most, score);
        v_store(scores + t, score);
    }
    const vf top = v_all(v_largest(most));
    for (int64_t t = 0; t < length; t += LANES) {
        vf weight = NAME(exponential)(v_sub(v_load(scores + t), top));
        if (t + LANES > length) weight = v_first(length - t, weight, v_zero());
        total = v_add(total, weight);
        v_store(scores + t, weight);
    }
    for (int64_t p = 0; p < parts; p++) sums[0][p] = sums[1][p] = v_zero();
    for (int64_t t = 0; t < length; t += 2)
#pragma GCC unroll 2
        for (int64_t odd = 0; odd < 2; odd++) {
            if (t + odd == length) break;
            const vf weight = v_all(scores[t + odd]);
            const char *value = values + (t + odd) * d_kv * size;
            FETCH(next + (t + odd) * d_kv * size);
            for (int64_t p = 0; p < parts; p++)
                sums[odd][p] = v_fma(weight, CACHED(value + p * LANES * size), sums[odd][p]);
        }
    const vf inverse = v_all(1.0f / v_sum(total));
    for (int64_t p = 0; p < parts; p++) v_store(out + p * LANES, v_mul(v_add(sums[0][p], sums[1][p]), inverse));
}

static void NAME(attend)(int64_t half, const float *q, const char *keys, const char *values, const char *next,
                         int64_t length, int64_t d_kv, const float *bias, int64_t max_distance, float *scores,
                         float *out) {
#define ATTEND(half, d_kv)                                                                                            \
    NAME(attend_over)(half, q, keys, values, next, length, d_kv, bias, max_distance, scores, out)
    if (half && d_kv == 64) ATTEND(1, 64);
    else if (d_kv == 64) ATTEND(0, 64);
    else if (half) ATTEND(1, d_kv);
    else ATTEND(0, d_kv);
#undef ATTEND
}

/* Keep one head's key or value; a half cache keeps what is beyond float16 as its largest number. */
static void NAME(keep)(int64_t half, const float *from, int64_t d_kv, char *to) {
    if (!half) {
        memcpy(to, from, (size_t)d_kv * 4);
        return;
    }
    for (int64_t d = 0; d < d_kv; d += LANES) {
        const vf x = v_max(v_all(-65504.0f), v_min(v_all(65504.0f), v_load(from + d)));
        v_store_half((uint16_t *)to + d, x);
    }
}

/* -- the decode step, by one of `threads` threads ---------------------------------------------------------------------
 * Rows are shared out where each is worked on as a whole, outputs in a product, (sequence, head) pairs in attention. */

#define FIRST(count) ((count) * team.thread / team.threads)
#define LAST(count) ((count) * (team.thread + 1) / team.threads)

/* The layer's quantized rows from `x`, of this thread's rows; nothing to do for float weights. */
static void NAME(quantize_share)(const Linear *linear, const float *x, int64_t x_step, int64_t rows,
                                 Quantized *quantized, Team team) {
#ifdef WITH_VNNI
    for (int64_t row = FIRST(rows); row < LAST(rows) && linear->kind >= INT16; row++) {
        const float *from = x + row * x_step;
        uint8_t *levels = quantized->levels + row * quantized->step;
        float *scales = quantized->scales + row * quantized->scales_step;
        if (linear->kind == INT16)
            NAME(quantize16)(from, linear->inputs, (int16_t *)levels, (int16_t *)(levels + quantized->step / 2), scales,
                             scales + quantized->scales_step / 2);
        else if (linear->kind == INT8) *scales = NAME(quantize)(from, linear->inputs, levels, NULL);
        else *scales = NAME(quantize)(from, linear->inputs, levels, levels + quantized->step / 2);
    }
    spent(team, ROUNDING);
#else
    (void)linear, (void)x, (void)x_step, (void)rows, (void)quantized, (void)team;
#endif
}

/* x = norm of h, and y = linear of it. */
static void NAME(normalized_product)(const float *norm, float epsilon, const Linear *linear, int64_t batch, Scratch *s,
                                     Team team) {
    for (int64_t row = FIRST(batch); row < LAST(batch); row++)
        NAME(normalize)(s->h + row * s->h_step, norm, epsilon, linear->inputs, s->x + row * s->x_step);
    spent(team, BY_ROW);
    NAME(quantize_share)(linear, s->x, s->x_step, batch, &s->quantized, team);
    BARRIER
    NAME(product)(linear, s->x, s->x_step, &s->quantized, batch, FIRST(linear->blocks), LAST(linear->blocks), 0, s->y,
                  s->y_step);
    spent(team, PRODUCTS);
    BARRIER
}

/* h += linear of `from`. */
static void NAME(added_product)(const Linear *linear, const float *from, int64_t from_step, int64_t batch, Scratch *s,
                                Team team) {
    if (linear->kind >= INT16) {
        NAME(quantize_share)(linear, from, from_step, batch, &s->quantized, team);
        BARRIER
    }
    NAME(product)(linear, from, from_step, &s->quantized, batch, FIRST(linear->blocks), LAST(linear->blocks), 1, s->h,
                  s->h_step);
    spent(team, PRODUCTS);
    BARRIER
}

/* y = the activation of wi's outputs x, gated where the model is. */
static void NAME(feed_forward)(const Model *model, const Layer *layer, int64_t batch, Scratch *s, Team team) {
    for (int64_t row = FIRST(batch); row < LAST(batch); row++)
        NAME(normalize)(s->h + row * s->h_step, layer->feed_norm, (float)model->epsilon, model->d_model,
                        s->x + row * s->x_step);
    spent(team, BY_ROW);
    NAME(quantize_share)(&layer->wi, s->x, s->x_step, batch, &s->quantized, team);
    BARRIER
    /* A thread computes the same outputs of both halves, so it needs nobody else's to join them. */
    const int64_t blocks = model->gated ? layer->wi.blocks / 2 : layer->wi.blocks;
    const int64_t from = FIRST(blocks), to = LAST(blocks);
    NAME(product)(&layer->wi, s->x, s->x_step, &s->quantized, batch, from, to, 0, s->y, s->y_step);
    if (model->gated)
        NAME(product)(&layer->wi, s->x, s->x_step, &s->quantized, batch, blocks + from, blocks + to, 0, s->y,
                      s->y_step);
    spent(team, PRODUCTS);
    for (int64_t row = 0; row < batch; row++) {
        float *y = s->y + row * s->y_step + from * BLOCK;
        NAME(activate_row)(model->activation, model->gated, y, blocks * BLOCK, (to - from) * BLOCK, y);
    }
    spent(team, BY_ROW);
    BARRIER
    NAME(added_product)(&layer->wo, s->y, s->y_step, batch, s, team);
}

/* One head of one sequence: where its keys and values are, and how many. */
typedef struct {
    char *keys, *values;
    int64_t length;
} NAME(Place);

static NAME(Place) NAME(place)(const Model *model, const Row *row, int64_t layer, int64_t head, int cross) {
    const int64_t size = model->half_cache ? 2 : 4;
    const Cached *in = cross ? &row->cross : &row->self;
    char *keys = in->rows + (layer * in->layer_step + head * in->head_step) * size;
    return (NAME(Place)){keys, keys + in->kind_step * size, in->length};
}

/* x = attention of the queries at the beginning of each y. For self-attention the keys and values follow there, and
 * are kept first. */
static void NAME(attention)(const Model *model, const Row *rows, int64_t batch, int64_t layer, int cross, Scratch *s,
                            Team team) {
    const int64_t heads = model->heads, d_kv = model->d_kv, inner = heads * d_kv, half = model->half_cache;
    const int64_t total = cross ? s->cross_cost : s->self_cost, first = FIRST(total), last = LAST(total);
    int64_t cost = 0;
    for (int64_t row = 0; row < batch && cost < last; row++) {
        const int64_t one = (cross ? rows[row].cross.length : rows[row].self.length) + HEAD_COST;
        if (cost + one * heads <= first) {
            cost += one * heads;
            continue;
        }
        for (int64_t head = 0; head < heads; head++, cost += one) {
            if (cost < first || cost >= last) continue;
            const NAME(Place) here = NAME(place)(model, rows + row, layer, head, cross);
            const int64_t more = head + 1 < heads ? 0 : row + 1 < batch; /* the next head is the next sequence's */
            const NAME(Place) next = NAME(place)(model, rows + row + more, layer, more ? 0 : (head + 1) % heads, cross);
            const float *q = s->y + row * s->y_step + head * d_kv;
            if (!cross) {
                const int64_t at = (here.length - 1) * d_kv * (half ? 2 : 4);
                NAME(keep)(half, q + inner, d_kv, here.keys + at);
                NAME(keep)(half, q + 2 * inner, d_kv, here.values + at);
            }
            NAME(attend)(half, q, here.keys, here.values, next.keys, here.length, d_kv,
                         cross ? NULL : model->bias + head * (model->max_distance + 1), model->max_distance,
                         s->scores + team.thread * s->scores_step, s->x + row * s->x_step + head * d_kv);
        }
    }
    spent(team, ATTENTION);
    BARRIER
}

static void NAME(step)(const Model *model, const Row *rows, int64_t batch, Scratch *s, Team team, float *out) {
    const float epsilon = (float)model->epsilon;
    for (int64_t row = FIRST(batch); row < LAST(batch); row++)
        memcpy(s->h + row * s->h_step, model->embedding + rows[row].token * model->d_model,
               (size_t)model->d_model * 4);
    for (int64_t number = 0; number < model->layers; number++) {
        const Layer *layer = model->layer + number;
        NAME(normalized_product)(layer->self_norm, epsilon, &layer->qkv, batch, s, team);
        NAME(attention)(model, rows, batch, number, 0, s, team);
        NAME(added_product)(&layer->self_out, s->x, s->x_step, batch, s, team);
        NAME(normalized_product)(layer->cross_norm, epsilon, &layer->cross_q, batch, s, team);
        NAME(attention)(model, rows, batch, number, 1, s, team);
        NAME(added_product)(&layer->cross_out, s->x, s->x_step, batch, s, team);
        NAME(feed_forward)(model, layer, batch, s, team);
    }
    for (int64_t row = FIRST(batch); row < LAST(batch); row++)
        NAME(normalize)(s->h + row * s->h_step, model->final_norm, epsilon, model->d_model, out + row * model->d_model);
    spent(team, BY_ROW);
}

/* -- single operations over many rows ---------------------------------------------------------------------------- */

/* A thread's share of out [rows, 64 * blocks] (+)= x W^T for many rows: pieces of rows times blocks of outputs, enough
 * of them for every thread, and of a size for the cache. */
static void NAME(units)(const Linear *linear, const float *x, int64_t x_step, const Quantized *quantized, int64_t rows,
                        Team team, int add, float *out, int64_t out_step) {
    const int64_t pieces = (rows + PIECE_ROWS - 1) / PIECE_ROWS, units = pieces * linear->blocks;
    for (int64_t unit = FIRST(units), next; unit < LAST(units); unit = next) {
        const int64_t piece = unit / linear->blocks, block = unit % linear->blocks;
        next = (piece + 1) * linear->blocks < LAST(units) ? (piece + 1) * linear->blocks : LAST(units);
        const int64_t from = rows * piece / pieces, count = rows * (piece + 1) / pieces - from;
        Quantized part = *quantized;
        part.levels += from * part.step;
        part.scales += from * part.scales_step;
        NAME(product)(linear, x + from * x_step, x_step, &part, count, block, block + next - unit, add,
                      out + from * out_step, out_step);
    }
}

static void NAME(linear)(const Linear *linear, const float *x, int64_t rows, Quantized *quantized, Team team,
                         float *out) {
    if (linear->kind >= INT16) {
        NAME(quantize_share)(linear, x, linear->inputs, rows, quantized, team);
        BARRIER
    }
    NAME(units)(linear, x, linear->inputs, quantized, rows, team, 0, out, linear->blocks * BLOCK);
    spent(team, PRODUCTS);
}

static void NAME(normalize_rows)(const float *x, const float *weight, double epsilon, int64_t rows, int64_t width,
                                 Team team, float *out) {
    for (int64_t row = FIRST(rows); row < LAST(rows); row++)
        NAME(normalize)(x + row * width, weight, (float)epsilon, width, out + row * width);
    spent(team, BY_ROW);
}

static void NAME(activate_rows)(int64_t activation, int64_t gated, const float *x, int64_t rows, int64_t width,
                                Team team, float *out) {
    for (int64_t row = FIRST(rows); row < LAST(rows); row++)
        NAME(activate_row)(activation, gated, x + row * width * (gated ? 2 : 1), width, width, out + row * width);
    spent(team, BY_ROW);
}

/* -- attention within texts -------------------------------------------------------------------------------------------
 * A unit is up to ATTENTION_ROWS queries of one head of one text. Its keys are laid out as a product's weights, so are
 * its values, and two products do the rest: of the last block of keys just the panels that hold some. `line`
 * [heads, 2 * longest - 1] is the bias of a key's distance. */

static void NAME(soften)(float *score, const float *bias, int64_t length, int64_t padded) {
    for (int64_t at = 0; at < length; at++) score[at] += bias[at];
    for (int64_t at = length; at < padded; at++) score[at] = -INFINITY;
    vf most = v_load(score);
    for (int64_t at = LANES; at < padded; at += LANES) most = v_max(most, v_load(score + at));
    const vf top = v_all(v_largest(most));
    vf total = v_zero();
    for (int64_t at = 0; at < padded; at += LANES) {
        const vf weight = NAME(exponential)(v_sub(v_load(score + at), top));
        total = v_add(total, weight);
        v_store(score + at, weight);
    }
    const vf inverse = v_all(1.0f / v_sum(total));
    for (int64_t at = 0; at < padded; at += LANES) v_store(score + at, v_mul(v_load(score + at), inverse));
}

static void NAME(attend_unit)(const Texts *t, int64_t start, int64_t length, int64_t head, int64_t first, int64_t last,
                              float *room) {
    const int64_t d_kv = t->d_kv, padded = (length + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t wide = (length + LANES - 1) / LANES * LANES, blocks = wide / BLOCK;
    const int64_t panels = (wide - blocks * BLOCK) / LANES;
    const int64_t parts = (d_kv + BLOCK - 1) / BLOCK;
    float *keys = room, *values = keys + padded * d_kv, *scores = values + parts * length * BLOCK;
    float *result = scores + ATTENTION_PIECE * padded;
    for (int64_t at = 0; at < wide; at++) {
        const float *key = t->k + (start + at) * t->step + head * d_kv;
        float *to = keys + at / BLOCK * d_kv * BLOCK + at % BLOCK;
        for (int64_t d = 0; d < d_kv; d++) to[d * BLOCK] = at < length ? key[d] : 0.0f;
    }
    for (int64_t part = 0; part < parts; part++)
        for (int64_t at = 0; at < length; at++) {
            const float *value = t->v + (start + at) * t->step + head * d_kv + part * BLOCK;
            float *to = values + (part * length + at) * BLOCK;
            const int64_t count = d_kv - part * BLOCK < BLOCK ? d_kv - part * BLOCK : BLOCK;
            memcpy(to, value, (size_t)count * 4);
            memset(to + count, 0, (size_t)(BLOCK - count) * 4);
        }
    const Linear by_keys = {FLOAT32, d_kv, blocks, keys, NULL, NULL};
    const Linear by_values = {FLOAT32, length, parts, values, NULL, NULL};
    const float *line = t->line + head * (2 * t->longest - 1) + t->longest - 1;
    for (int64_t from = first; from < last; from += ATTENTION_PIECE) {
        const int64_t count = last - from < ATTENTION_PIECE ? last - from : ATTENTION_PIECE;
        NAME(product)(&by_keys, t->q + (start + from) * t->step + head * d_kv, t->step, NULL, count, 0, blocks, 0,
                      scores, padded);
        for (int64_t row = 0, some; row < count && panels > 0; row += some) {
            some = count - row < MAX_ROWS ? count - row : MAX_ROWS;
            NAME(narrow)(panels, some, t->q + (start + from + row) * t->step + head * d_kv, t->step,
                         (const char *)(keys + blocks * d_kv * BLOCK), d_kv, scores + row * padded + blocks * BLOCK,
                         padded);
        }
        for (int64_t row = 0; row < count; row++)
            NAME(soften)(scores + row * padded, line - (from + row), length, wide);
        NAME(product)(&by_values, scores, padded, NULL, count, 0, parts, 0, result, parts * BLOCK);
        for (int64_t row = 0; row < count; row++)
            memcpy(t->out + ((start + from + row) * t->heads + head) * d_kv, result + row * parts * BLOCK,
                   (size_t)d_kv * 4);
    }
}

static void NAME(attend_texts)(const Texts *t, Team team) {
    const int64_t from = FIRST(t->cost), to = LAST(t->cost);
    int64_t start = 0, cost = 0;
    for (int64_t text = 0; text < t->texts; text++) {
        const int64_t length = t->lengths[text];
        for (int64_t head = 0; head < t->heads; head++)
            for (int64_t first = 0; first < length; first += ATTENTION_ROWS) {
                const int64_t last = length - first < ATTENTION_ROWS ? length : first + ATTENTION_ROWS;
                if (cost >= from && cost < to)
                    NAME(attend_unit)(t, start, length, head, first, last, t->room + team.thread * t->room_step);
                cost += (last - first) * length;
            }
        start += length;
    }
    spent(team, ATTENTION);
}

/* -- the encoder --------------------------------------------------------------------------------------------------- */

/* out (+)= linear of x, which each thread has made its share of. */
static void NAME(shared_product)(const Linear *linear, const float *x, int64_t x_step, int64_t rows, Scratch *s,
                                 Team team, int add, float *out, int64_t out_step) {
    NAME(quantize_share)(linear, x, x_step, rows, &s->quantized, team);
    BARRIER
    NAME(units)(linear, x, x_step, &s->quantized, rows, team, add, out, out_step);
    spent(team, PRODUCTS);
    BARRIER
}

/* h += feed-forward of it. */
static void NAME(feed_rows)(const Encoder *encoder, const EncoderLayer *layer, float *h, int64_t rows, Scratch *s,
                            Team team) {
    for (int64_t row = FIRST(rows); row < LAST(rows); row++)
        NAME(normalize)(h + row * s->h_step, layer->feed_norm, (float)encoder->epsilon, encoder->d_model,
                        s->x + row * s->x_step);
    spent(team, BY_ROW);
    const int64_t step = layer->wi.blocks * BLOCK, width = encoder->gated ? step / 2 : step;
    NAME(shared_product)(&layer->wi, s->x, s->x_step, rows, s, team, 0, s->y, step);
    for (int64_t row = FIRST(rows); row < LAST(rows); row++) {
        float *y = s->y + row * step;
        NAME(activate_row)(encoder->activation, encoder->gated, y, width, width, y);
    }
    spent(team, BY_ROW);
    NAME(shared_product)(&layer->wo, s->y, step, rows, s, team, 1, h, s->h_step);
}

/* Keep this thread's share of the keys and values [tokens] in the rows of their prompts. */
static void NAME(keep_rows)(const Encoder *encoder, int64_t layer, const float *keys_values, int64_t step,
                            const Texts *texts, const Cached *rows, Team team) {
    const int64_t heads = encoder->heads, d_kv = encoder->d_kv, size = encoder->half_cache ? 2 : 4;
    for (int64_t text = 0; text < texts->texts; text++) {
        const int64_t length = texts->lengths[text];
        const Cached *row = rows + text;
        for (int64_t number = FIRST(2 * heads); number < LAST(2 * heads); number++) {
            const int64_t kind = number / heads, head = number % heads;
            char *to = row->rows + (layer * row->layer_step + kind * row->kind_step + head * row->head_step) * size;
            for (int64_t at = 0; at < length; at++)
                NAME(keep)(encoder->half_cache, keys_values + at * step + number * d_kv, d_kv, to + at * d_kv * size);
        }
        keys_values += length * step;
    }
}

/* States of all texts' tokens, normalized; and, with `rows`, their keys and values for the decoder. texts->q, k, v and
 * out point into the scratch. */
static void NAME(encode)(const Encoder *encoder, const int64_t *tokens, const Texts *texts, const Cached *rows,
                         Scratch *s, Team team, float *states) {
    const float epsilon = (float)encoder->epsilon;
    const int64_t width = encoder->d_model, inner = encoder->heads * encoder->d_kv, step = texts->step;
    int64_t count = 0;
    for (int64_t text = 0; text < texts->texts; text++) count += texts->lengths[text];
    const int64_t low = FIRST(count), high = LAST(count);
    for (int64_t row = low; row < high; row++)
        memcpy(s->h + row * s->h_step, encoder->embedding + tokens[row] * width, (size_t)width * 4);
    for (int64_t number = 0; number < encoder->layers; number++) {
        const EncoderLayer *layer = encoder->layer + number;
        for (int64_t row = low; row < high; row++)
            NAME(normalize)(s->h + row * s->h_step, layer->self_norm, epsilon, width, s->x + row * s->x_step);
        spent(team, BY_ROW);
        NAME(shared_product)(&layer->qkv, s->x, s->x_step, count, s, team, 0, s->y, step);
        NAME(attend_texts)(texts, team);
        BARRIER
        NAME(shared_product)(&layer->self_out, texts->out, inner, count, s, team, 1, s->h, s->h_step);
        for (int64_t row = 0; row < count; row += FEED_ROWS)
            NAME(feed_rows)(encoder, layer, s->h + row * s->h_step, count - row < FEED_ROWS ? count - row : FEED_ROWS,
                            s, team);
    }
    for (int64_t row = low; row < high; row++)
        NAME(normalize)(s->h + row * s->h_step, encoder->final_norm, epsilon, width, states + row * width);
    spent(team, BY_ROW);
    if (rows == NULL) return;
    BARRIER
    for (int64_t layer = 0, made = FLOAT32; layer < encoder->decoder_layers; layer++) {
        const Linear *cross = encoder->cross + layer;
        if (cross->kind >= INT16 && cross->kind != made) { /* mostly once: they are of one kind */
            NAME(quantize_share)(cross, states, width, count, &s->quantized, team);
            BARRIER
            made = cross->kind;
        }
        NAME(units)(cross, states, width, &s->quantized, count, team, 0, s->y, step);
        spent(team, PRODUCTS);
        BARRIER
        NAME(keep_rows)(encoder, layer, s->y, step, texts, rows, team);
        spent(team, BY_ROW);
        BARRIER
    }
}

/* -- the shortlist head -------------------------------------------------------------------------------------------- */

#ifdef WITH_VNNI
static float NAME(dot)(const Head *head, int64_t token, const float *state) {
    const int64_t width = head->product.inputs;
    vf sum = v_zero();
    for (int64_t k = 0; k < width; k += LANES) {
        const vf weight = head->half ? v_half((const uint16_t *)head->weight + token * width + k)
                                     : v_load((const float *)head->weight + token * width + k);
        sum = v_fma(weight, v_load(state + k), sum);
    }
    return v_sum(sum);
}

static float NAME(bound)(const Head *head, const HeadScratch *s, int64_t row, int64_t block) {
    return s->norm[row] * head->lost[block] + s->loss[row] * head->norms[block];
}

/* Of `count` listed tokens of a row, keep those that may be the best where the best is at least `reached`. */
static int64_t NAME(sift)(const Head *head, const HeadScratch *s, int64_t row, float reached, int64_t count,
                          int32_t *tokens, float *logits) {
    int64_t kept = 0;
    for (int64_t at = 0; at < count; at++)
        if (logits[at] >= reached - NAME(bound)(head, s, row, tokens[at] / SHORTLIST_BLOCK)) {
            tokens[kept] = tokens[at];
            logits[kept++] = logits[at];
        }
    return kept;
}

/* Each row's best token. Every thread goes through some of the blocks and lists what can be it, as far as is known;
 * when all are done, it computes what is left of its list. Tokens come in order: of equal ones the first is taken. */
static void NAME(shortlist)(const Head *head, const float *states, int64_t rows, HeadScratch *s, Team team,
                            Choice *best) {
    const int64_t width = head->product.inputs, blocks = head->padded / SHORTLIST_BLOCK, room = 2 * head->most;
    const int64_t low = FIRST(blocks), high = LAST(blocks), own = team.thread * rows;
    float *logits = s->logits + own * SHORTLIST_BLOCK, *reached = s->reached + own;
    Choice *choices = s->choices + own;
    for (int64_t row = FIRST(rows); row < LAST(rows); row++) {
        const float *state = states + row * width;
        const float largest = NAME(quantize)(state, width, s->quantized.levels + row * s->quantized.step, NULL);
        const vf factor = v_all(largest > 1e-30f ? 127.0f / largest : 0.0f);
        vf square = v_zero(), left = v_zero();
        for (int64_t k = 0; k < width; k += LANES) {
            const vf x = v_load(state + k), exact = v_mul(x, factor), rest = v_sub(exact, v_round(exact));
            square = v_fma(x, x, square);
            left = v_fma(rest, rest, left);
        }
        s->quantized.scales[row * s->quantized.scales_step] = largest;
        s->norm[row] = sqrtf(v_sum(square));
        /* A state too small to be quantized is lost as a whole. */
        s->loss[row] = largest > 1e-30f ? sqrtf(v_sum(left)) * largest / 127.0f * 1.00001f : s->norm[row];
    }
    spent(team, ROUNDING);
    for (int64_t row = 0; row < rows; row++) {
        reached[row] = -INFINITY;
        choices[row] = (Choice){-1, 0, -INFINITY};
    }
    BARRIER
    for (int64_t block = low; block < high; block++) {
        const int64_t first = block * SHORTLIST_BLOCK;
        NAME(product)(&head->product, NULL, 0, &s->quantized, rows, block * 2, block * 2 + 2, 0,
                      logits - first, SHORTLIST_BLOCK);
        spent(team, PRODUCTS);
        for (int64_t row = 0; row < rows; row++) {
            float *logit = logits + row * SHORTLIST_BLOCK;
            for (int64_t at = head->vocabulary > first ? head->vocabulary - first : 0; at < SHORTLIST_BLOCK; at++)
                logit[at] = -INFINITY;
            vf most = v_load(logit);
            for (int64_t at = LANES; at < SHORTLIST_BLOCK; at += LANES) most = v_max(most, v_load(logit + at));
            const float largest = v_largest(most), bound = NAME(bound)(head, s, row, block);
            reached[row] = largest - bound > reached[row] ? largest - bound : reached[row];
            const float least = reached[row] - bound;
            if (!(largest >= least)) continue;
            int32_t *tokens = s->tokens + (own + row) * room;
            float *listed = s->listed + (own + row) * room;
            int64_t count = choices[row].candidates;
            if (count > room - SHORTLIST_BLOCK && count <= room)
                count = NAME(sift)(head, s, row, reached[row], count, tokens, listed);
            if (count > room - SHORTLIST_BLOCK) count = room + 1; /* too many, once and for all */
            else
                for (int64_t at = 0; at < SHORTLIST_BLOCK; at += LANES) {
                    const vf some = v_load(logit + at);
                    const __mmask16 kept = _mm512_cmp_ps_mask(some, v_all(least), _CMP_GE_OQ);
                    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                    _mm512_mask_compressstoreu_epi32(tokens + count, kept,
                                                     _mm512_add_epi32(step, _mm512_set1_epi32((int)(first + at))));
                    _mm512_mask_compressstoreu_ps(listed + count, kept, some);
                    count += __builtin_popcount(kept);
                }
            choices[row].candidates = count;
        }
        spent(team, BY_ROW);
    }
    BARRIER
    for (int64_t row = 0; row < rows; row++) {
        int32_t *tokens = s->tokens + (own + row) * room;
        float least = -INFINITY;
        for (int64_t thread = 0; thread < team.threads; thread++)
            least = s->reached[thread * rows + row] > least ? s->reached[thread * rows + row] : least;
        int64_t count = choices[row].candidates;
        if (count <= room) count = NAME(sift)(head, s, row, least, count, tokens, s->listed + (own + row) * room);
        choices[row].candidates = count;
        for (int64_t at = 0; at < count && count <= head->most; at++) {
            const float logit = NAME(dot)(head, tokens[at], states + row * width);
            if (logit > choices[row].logit) {
                choices[row].logit = logit;
                choices[row].token = tokens[at];
            }
        }
    }
    spent(team, BY_ROW);
    BARRIER
    for (int64_t row = FIRST(rows); row < LAST(rows); row++) {
        best[row] = s->choices[row];
        for (int64_t thread = 1; thread < team.threads; thread++) {
            const Choice *other = s->choices + thread * rows + row;
            best[row].candidates += other->candidates;
            if (other->logit > best[row].logit) {
                best[row].logit = other->logit;
                best[row].token = other->token;
            }
        }
    }
    spent(team, BY_ROW);
}
#endif

const Kernels NAME(kernels) = {NAME(step), NAME(linear), NAME(normalize_rows), NAME(activate_rows), NAME(attend_texts),
                               NAME(encode),
#ifdef WITH_VNNI
                               NAME(shortlist)
#else
                               NULL
#endif
};
