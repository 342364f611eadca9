/* Attention of a few queries against a cache on a CPU; called by cpu.py, which holds the contract.
 *
 * Work items are (row, key head): the slots that a query sees are listed first, in their order, and each key and value is then read once for
 * all query heads of the group. Sums run over that list alone, so a row's result, to the last bit, depends neither on the other rows nor on
 * slots that it does not see, and these are never read. Vectors run over 16 numbers of a head (gcc's vector extensions).
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define HEADS 4 /* query heads at a time; `sums` and the order of lanes in `exponentials` are written for 4 */
#define MAX_VECTORS 16 /* of a head */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
    const float *q, *k, *v;                             /* (B, H, T, K), (B, G, S, K): K next to each other */
    int64_t q_row, q_head, q_step, k_row, k_head, k_slot, v_row, v_head, v_slot; /* strides in elements */
    const int64_t *key_positions, *query_positions;     /* (B, S), (B, T) contiguous; -1: an empty slot */
    float *out;                                         /* (B, H, T, K) contiguous */
    int64_t batch, heads, groups, length, slots, size, window; /* window 0: none */
    float scale_log2;                                   /* of the scores, times log2(e) */
    int32_t threads;
} Cached;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf blend(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* 2^x, as in scan.c. */
INLINE vf exp2v(vf x) {
#ifdef __AVX512F__
    vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - whole;
#else
    x = blend(x < splat(-126.0f), splat(-126.0f), x);
    x = blend(x > splat(127.0f), splat(127.0f), x);
    const vf magic = splat(12582912.0f);
    vf shifted = x + magic, f = x - (shifted - magic);
#endif
    vf p = splat(1.32647273e-03f);
    p = p * f + splat(9.67151299e-03f);
    p = p * f + splat(5.55073358e-02f);
    p = p * f + splat(2.40222424e-01f);
    p = p * f + splat(6.93147004e-01f);
    p = p * f + splat(1.0f);
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

/* Lanes {0,4,8,12} hold the sums of the four vectors. */
INLINE vf sums(vf a, vf b, vf c, vf d) {
    const vi low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
    const vi first = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, second = first + 4;
    a = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    c = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
    a = __builtin_shuffle(a, c, first) + __builtin_shuffle(a, c, second);
    a += __builtin_shuffle(a, (vi){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return a + __builtin_shuffle(a, (vi){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

INLINE vf larger(vf a, vf b) { return blend(a > b, a, b); }

/* Of 4 slots with HEADS scores each: x moved on by two slots, by one. */
INLINE vf by_two(vf x) { return __builtin_shuffle(x, (vi){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}); }
INLINE vf by_one(vf x) { return __builtin_shuffle(x, (vi){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}); }

/* In place: scores (n, HEADS) to weights that are not normalised yet; returns 1 / their sums, lane h that of head h. */
INLINE vf exponentials(float *scores, int64_t n) {
    for (int64_t i = n * HEADS; i % LANES; i++) scores[i] = -INFINITY;
    vf top = splat(-INFINITY), total = splat(0.0f);
    for (int64_t i = 0; i < n * HEADS; i += LANES) top = larger(*(vf_any *)(scores + i), top);
    top = larger(top, by_two(top));
    top = larger(top, by_one(top));
    for (int64_t i = 0; i < n * HEADS; i += LANES) {
        vf weight = exp2v(*(vf_any *)(scores + i) - top);
        *(vf_any *)(scores + i) = weight;
        total += weight;
    }
    total += by_two(total);
    return splat(1.0f) / (total + by_one(total));
}

/* One query position of `heads` heads of a group; heads that are missing have queries of 0. q, out: of the first of them. */
INLINE void attend(const Cached *c, const float *q, const float *k, const float *v, float *out, int heads, const int32_t *seen, int64_t n,
                   float *scores, int vectors) {
    vf query[HEADS][MAX_VECTORS], acc[HEADS][MAX_VECTORS];
    for (int h = 0; h < HEADS; h++)
        for (int d = 0; d < vectors; d++) {
            query[h][d] = acc[h][d] = splat(0.0f);
            if (h < heads) query[h][d] = *(const vf_any *)(q + h * c->q_head + d * LANES) * splat(c->scale_log2);
        }
    for (int64_t i = 0; i < n; i++) {
        const float *key = k + seen[i] * c->k_slot;
        vf products[HEADS];
        for (int h = 0; h < HEADS; h++) {
            products[h] = query[h][0] * *(const vf_any *)key;
            for (int d = 1; d < vectors; d++) products[h] += query[h][d] * *(const vf_any *)(key + d * LANES);
        }
        const vf score = sums(products[0], products[1], products[2], products[3]);
        for (int h = 0; h < HEADS; h++) scores[i * HEADS + h] = score[4 * h];
    }
    const vf inverse = exponentials(scores, n);
    for (int64_t i = 0; i < n; i++) {
        const float *value = v + seen[i] * c->v_slot;
        for (int h = 0; h < HEADS; h++)
            for (int d = 0; d < vectors; d++) acc[h][d] += splat(scores[i * HEADS + h]) * *(const vf_any *)(value + d * LANES);
    }
    for (int h = 0; h < heads; h++)
        for (int d = 0; d < vectors; d++) *(vf_any *)(out + h * c->length * c->size + d * LANES) = acc[h][d] * splat(inverse[h]);
}

static int64_t visible(const Cached *c, int64_t row, int64_t step, int32_t *seen) {
    const int64_t *positions = c->key_positions + row * c->slots, newest = c->query_positions[row * c->length + step];
    const int64_t oldest = c->window && newest - c->window + 1 > 0 ? newest - c->window + 1 : 0;
    int64_t n = 0;
    for (int64_t s = 0; s < c->slots; s++) {
        seen[n] = (int32_t)s;
        n += positions[s] >= oldest && positions[s] <= newest;
    }
    return n;
}

static void work(const Cached *c, int64_t item, int32_t *seen, float *scores) {
    const int64_t row = item / c->groups, group = item % c->groups, repeats = c->heads / c->groups;
    const float *k = c->k + row * c->k_row + group * c->k_head, *v = c->v + row * c->v_row + group * c->v_head;
    for (int64_t t = 0; t < c->length; t++) {
        const int64_t n = visible(c, row, t, seen);
        for (int64_t first = 0; first < repeats; first += HEADS) {
            const int64_t head = group * repeats + first;
            const int heads = repeats - first < HEADS ? (int)(repeats - first) : HEADS;
            const float *q = c->q + row * c->q_row + head * c->q_head + t * c->q_step;
            float *out = c->out + ((row * c->heads + head) * c->length + t) * c->size;
            if (n == 0) {
                for (int h = 0; h < heads; h++)
                    for (int64_t d = 0; d < c->size; d++) out[h * c->length * c->size + d] = 0.0f;
                continue;
            }
#define CASE(V) case V: attend(c, q, k, v, out, heads, seen, n, scores, V); break;
            switch (c->size / LANES) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(6) CASE(8)
                default: attend(c, q, k, v, out, heads, seen, n, scores, (int)(c->size / LANES));
            }
        }
    }
}

/* Returns 0, or 1 where there is no memory. size: a multiple of 16 up to 256. */
int cached_attention_forward(const Cached *c) {
    int failed = 0;
    const int64_t items = c->batch * c->groups, padded = (c->slots + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(c->threads) if (items > 1)
    {
        int32_t *seen = malloc((padded + 1) * sizeof(int32_t));
        float *scores = malloc(HEADS * padded * sizeof(float));
        if (!seen || !scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++)
            if (seen && scores) work(c, item, seen, scores);
        free(seen);
        free(scores);
    }
    return failed;
}
