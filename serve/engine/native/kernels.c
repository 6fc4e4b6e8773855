/* T5's decode step on an x86-64 processor in one call: what the layers, the cache and the batch are is told by tables
 * of addresses. Threads are OpenMP's, from the library that torch has loaded already, so both have one pool of them. */
#include "types.h"

enum { NONE, WITH_AVX2, WITH_AVX512, WITH_AVX512_VNNI };

#if defined(__x86_64__) && defined(__GNUC__)

/* What this processor, and its operating system, can do. */
int64_t flan_level(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return NONE;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return WITH_AVX2;
    return __builtin_cpu_supports("avx512vnni") ? WITH_AVX512_VNNI : WITH_AVX512;
}

static const Kernels *kernels_of(int64_t level) {
    return level == WITH_AVX2 ? &kernels_avx2 : level == WITH_AVX512 ? &kernels_avx512 : &kernels_avx512_vnni;
}

#include <omp.h>

static Clock *profile;

/* Say in `clock` from now on where the time goes of each team's first thread, which takes part in all that is done;
 * NULL: no more. Not while a kernel runs. */
void flan_profile(Clock *clock) { profile = clock; }

static Clock *clock_of(int64_t thread, int64_t job) {
    if (profile == NULL || thread != 0) return NULL;
    profile->job = job;
    profile->since = now();
    return profile;
}

/* Every thread of a team calls the kernel. They meet at the end, too: see `meet`. */
#define PARALLEL(job, call)                                                                                           \
    const Kernels *kernels = kernels_of(level);                                                                       \
    Meeting meeting = {0};                                                                                            \
    if (threads == 1) {                                                                                               \
        const Team team = {0, 1, &meeting, clock_of(0, job)};                                                         \
        kernels->call;                                                                                                \
        return;                                                                                                       \
    }                                                                                                                 \
    _Pragma("omp parallel num_threads((int)threads)") {                                                               \
        const int64_t thread = omp_get_thread_num();                                                                  \
        const Team team = {thread, omp_get_num_threads(), &meeting, clock_of(thread, job)};                           \
        kernels->call;                                                                                                \
        meet(team);                                                                                                   \
        spent(team, WAITING);                                                                                         \
    }

/* One decoder position of each of `batch` sequences: out [batch, d_model] are the normalized states. */
void flan_step(int64_t level, int64_t threads, const Model *model, const Row *rows, int64_t batch, Scratch *scratch,
               float *out) {
    scratch->self_cost = scratch->cross_cost = 0;
    for (int64_t row = 0; row < batch; row++) {
        scratch->self_cost += model->heads * (rows[row].self.length + HEAD_COST);
        scratch->cross_cost += model->heads * (rows[row].cross.length + HEAD_COST);
    }
    PARALLEL(DECODER, step(model, rows, batch, scratch, team, out))
}

/* out [rows, 64 * blocks] = x [rows, inputs] W^T. `quantized` is room for integer layers' rows. */
void flan_linear(int64_t level, int64_t threads, const Linear *linear, const float *x, int64_t rows,
                 Quantized *quantized, float *out) {
    PARALLEL(SINGLE, linear(linear, x, rows, quantized, team, out))
}

/* T5's norm of x [rows, width]. */
void flan_normalize(int64_t level, int64_t threads, const float *x, const float *weight, double epsilon, int64_t rows,
                    int64_t width, float *out) {
    PARALLEL(SINGLE, normalize(x, weight, epsilon, rows, width, team, out))
}

/* The activation of x [rows, width]; gated: of x [rows, 2 * width], the first half of which gates the second. */
void flan_activate(int64_t level, int64_t threads, int64_t activation, int64_t gated, const float *x, int64_t rows,
                   int64_t width, float *out) {
    PARALLEL(SINGLE, activate(activation, gated, x, rows, width, team, out))
}

/* Self-attention within each text. `room_step` is at least what flan_attention_room says. */
void flan_attention(int64_t level, int64_t threads, Texts *texts) {
    texts->cost = 0;
    for (int64_t text = 0; text < texts->texts; text++)
        texts->cost += texts->heads * texts->lengths[text] * texts->lengths[text];
    PARALLEL(SINGLE, attend(texts, team))
}

/* States [tokens, d_model] of texts, normalized, and their keys and values in `rows` (or NULL): one for each text. */
void flan_encode(int64_t level, int64_t threads, const Encoder *encoder, const int64_t *tokens, Texts *texts,
                 const Cached *rows, Scratch *scratch, float *states) {
    texts->cost = 0;
    for (int64_t text = 0; text < texts->texts; text++)
        texts->cost += texts->heads * texts->lengths[text] * texts->lengths[text];
    PARALLEL(ENCODER, encode(encoder, tokens, texts, rows, scratch, team, states))
}

/* The best token of each of `rows` states; rows with no candidates, or with more than head->most, have no sure one. */
void flan_shortlist(int64_t level, int64_t threads, const Head *head, const float *states, int64_t rows,
                    HeadScratch *scratch, Choice *best) {
    PARALLEL(HEAD, shortlist(head, states, rows, scratch, team, best))
}

/* float32 that a thread needs for texts of up to `longest` tokens. */
int64_t flan_attention_room(int64_t longest, int64_t d_kv) {
    const int64_t padded = (longest + BLOCK - 1) / BLOCK * BLOCK, width = (d_kv + BLOCK - 1) / BLOCK * BLOCK;
    return padded * d_kv + longest * width + ATTENTION_PIECE * (padded + width);
}

#else

int64_t flan_level(void) { return NONE; }

#endif
