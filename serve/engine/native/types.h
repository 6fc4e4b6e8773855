/* What Python tells the kernels: tables of addresses and sizes, which serve/engine/native/library.py mirrors. */
#pragma once

#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define LANES 16            /* float32 numbers that are computed together */
#define BLOCK 64            /* outputs of a product whose weights lie together */
#define MAX_PARTS 16        /* d_kv is at most 16 x LANES */
#define INT_ROWS_MAX 6      /* of a tile: 6 x 4 sums, 4 weights and an activation */
#define PIECE_ROWS 96       /* rows of a large batch that are computed together */
#define ATTENTION_ROWS 192  /* queries that share one layout of keys and values */
#define ATTENTION_PIECE 48  /* and whose scores are in the cache together */
#define SHORTLIST_BLOCK 128 /* tokens that share a bound */
#define GROUP 32            /* activations of an int16 layer that share a scale */
#define UNEVEN 128          /* times the mean magnitude: a group's largest, beyond which its neighbours lose bits */
#define INT16_MOST 8191     /* magnitude of its numbers: GROUP products of two of them are within 32 bits */
#define FEED_ROWS 256       /* tokens whose feed-forward is computed together, within the cache */
#define MANY_LOOKS 1000     /* for a thread that others wait for */
#define HEAD_COST 16        /* of one head's attention besides its positions, in positions: for fair shares */

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { FLOAT32, FLOAT16, INT16, INT8, INT8_FINE }; /* from INT16 on activations are quantized, too */
enum { RELU, GELU_TANH, SILU };
/* Whose time it is (single operations: the last), and what it goes to; see `spent`. */
enum { DECODER, ENCODER, HEAD, SINGLE, JOBS };
enum { PRODUCTS, ATTENTION, ROUNDING, BY_ROW, WAITING, PARTS };

typedef struct {
    int64_t kind, inputs, blocks;
    const void *weight;
    const float *scales;    /* int16, int8: of each output */
    const int32_t *offsets; /* int8: 128 times each output's sum of weights */
} Linear;

typedef struct {
    const float *self_norm, *cross_norm, *feed_norm;
    Linear qkv, self_out, cross_q, cross_out, wi, wo;
} Layer;

typedef struct {
    const float *self_norm, *feed_norm;
    Linear qkv, self_out, wi, wo;
} EncoderLayer;

typedef struct {
    int64_t layers, decoder_layers, heads, d_kv, d_model, activation, gated, half_cache;
    double epsilon;
    const float *embedding; /* [vocabulary, d_model] */
    const float *final_norm;
    const EncoderLayer *layer;
    const Linear *cross; /* of each decoder layer: keys, then values, of its cross-attention */
} Encoder;

typedef struct {
    int64_t layers, heads, d_kv, d_model, activation, gated, max_distance, half_cache;
    double epsilon;
    const float *embedding;  /* [vocabulary, d_model] */
    const float *bias;       /* [heads, max_distance + 1]: of a key max_distance, ... 1, 0 positions behind the query */
    const float *final_norm;
    const Layer *layer;
} Model;

/* A row of the cache: `length` positions count. Values are `kind_step` after their keys. Steps are in numbers, which
 * are float32, or float16 in a half cache. */
typedef struct {
    char *rows;
    int64_t layer_step, kind_step, head_step, length;
} Cached;

/* One sequence: its input token, and its rows; the last position of its own is the one that is computed now. */
typedef struct {
    int64_t token;
    Cached self, cross;
} Row;

/* Where the threads of a team wait for each other; zeros at the beginning. */
typedef struct {
    int32_t arrived;
    char apart[60]; /* in another cache line than what the waiting look at */
    int32_t round;
} Meeting;

/* Where a thread's time has gone, in seconds, of the job that it works on and of those before. */
typedef struct {
    int64_t job;
    double since, seconds[JOBS][PARTS];
} Clock;

/* One of the threads that work on a job together. Mostly nobody asks where its time goes, and there is no clock. */
typedef struct {
    int64_t thread, threads;
    Meeting *meeting;
    Clock *clock;
} Team;

static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* What this thread has done since it last said so was that part. */
static inline void spent(Team team, int64_t part) {
    if (team.clock == NULL) return;
    const double at = now();
    team.clock->seconds[team.clock->job][part] += at - team.clock->since;
    team.clock->since = at;
}

/* Go on when all of the team are here. Mostly they are in a microsecond, so this looks again and again; but after some
 * tens of them it offers the processor to others. It may be the processor that a missing thread needs: OpenMP's own
 * barrier waits a thousand times as long, and beside another busy process a step took several times its time. */
static inline void meet(Team team) {
    if (team.threads == 1) return;
    Meeting *here = team.meeting;
    const int32_t round = __atomic_load_n(&here->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&here->arrived, 1, __ATOMIC_ACQ_REL) == team.threads) {
        __atomic_store_n(&here->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&here->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t looks = 0; __atomic_load_n(&here->round, __ATOMIC_ACQUIRE) == round; looks++)
        if (looks < MANY_LOOKS) PAUSE();
        else sched_yield();
}

/* Rows of activations as integers. A row has `step` bytes of them, in the first half its levels, int16 or uint8, in the
 * second what these leave over. Its scales are `scales_step`: int16 has one a group, of the levels in the first half
 * (and a number at its end), of what is left over in the second; int8 has one, the row's largest magnitude. */
typedef struct {
    uint8_t *levels;
    int64_t step;
    float *scales;
    int64_t scales_step;
} Quantized;

/* The head of rows that ask for their best token only: serve/engine/native/head.py. Blocks are of SHORTLIST_BLOCK
 * tokens; `padded` tokens are a whole number of them. */
typedef struct {
    Linear product;       /* int8, of `padded` outputs */
    const void *weight;   /* [vocabulary, inputs] as float32 or float16, a token after the other */
    const float *lost;    /* of each block: the most that rounding its weights changes a logit of a state of norm 1 */
    const float *norms;   /* of each block: its tokens' largest norm as int8 */
    int64_t half, vocabulary, padded, most; /* candidates that are looked at for a row */
} Head;

/* A row's best token as far as a thread has looked, and how many were candidates. */
typedef struct {
    int64_t token, candidates;
    double logit;
} Choice;

typedef struct {
    Quantized quantized;
    float *norm, *loss;    /* [rows] of the state, and of what its quantized form lacks */
    float *logits;         /* [threads, rows, SHORTLIST_BLOCK] */
    float *reached;        /* [threads, rows]: what the best logit is at least */
    float *listed;         /* [threads, rows, 2 * most]: logits that may be it */
    int32_t *tokens;       /* [threads, rows, 2 * most]: whose they are */
    Choice *choices;       /* [threads, rows] */
} HeadScratch;

/* Texts one after the other: q, k, v [tokens] of `step` float32 each, [heads, d_kv] of which are theirs; `out`
 * [tokens, heads, d_kv]. */
typedef struct {
    const float *q, *k, *v;
    float *out;
    int64_t step, heads, d_kv, texts, longest, cost;
    const int64_t *lengths;
    const float *line;
    float *room; /* room_step float32 a thread */
    int64_t room_step;
} Texts;

typedef struct {
    float *h, *x, *y, *scores;
    int64_t h_step, x_step, y_step, scores_step, self_cost, cross_cost;
    Quantized quantized;
} Scratch;

/* What one of the threads does of a job; compiled once for each instruction set. */
typedef struct {
    void (*step)(const Model *model, const Row *rows, int64_t batch, Scratch *scratch, Team team, float *out);
    void (*linear)(const Linear *linear, const float *x, int64_t rows, Quantized *quantized, Team team, float *out);
    void (*normalize)(const float *x, const float *weight, double epsilon, int64_t rows, int64_t width, Team team,
                      float *out);
    void (*activate)(int64_t activation, int64_t gated, const float *x, int64_t rows, int64_t width, Team team,
                     float *out);
    void (*attend)(const Texts *texts, Team team);
    void (*encode)(const Encoder *encoder, const int64_t *tokens, const Texts *texts, const Cached *rows,
                   Scratch *scratch, Team team, float *states);
    void (*shortlist)(const Head *head, const float *states, int64_t rows, HeadScratch *scratch, Team team,
                      Choice *best);
} Kernels;

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_vnni;
