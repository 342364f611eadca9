/* Softmax attention of one query position over a list of slots, for all query heads that share a key head. */
#pragma once
#include <math.h>
#include "vectors.h"

#define HEADS 4 /* query heads at a time */
#define SLOTS 4 /* keys at a time: HEADS * SLOTS scores are one vector, slot by slot, for which `sums` and `exponentials` are written */
#define MAX_VECTORS 16 /* of a head */

/* Lane i holds the sum over v[i]; each is summed in the same order. v is lost. */
INLINE vf sums(vf v[LANES]) {
    const vi eight = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const vi four = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const vi two = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const vi one = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#define HALVE(count, lower, apart)                                                             \
    for (int i = 0; i < count; i++) {                                                          \
        const vf a = v[2 * i], b = v[2 * i + 1];                                               \
        v[i] = __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, lower + apart);        \
    }
    HALVE(8, eight, 8) HALVE(4, four, 4) HALVE(2, two, 2) HALVE(1, one, 1)
#undef HALVE
    return v[0];
}

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

/* Heads `head` apart, slots `slot` apart, in elements. scale_log2: of the scores, times log2(e). */
typedef struct {
    int64_t q_head, k_slot, v_slot, out_head;
    float scale_log2;
} Attend;

/* `heads` query heads from q on (at most HEADS; those that are missing have queries of 0) against n > 0 slots: those that `seen` lists,
 * or the first n where it is null. k, v: slot 0 of the key head. scores: room for HEADS numbers a slot, n rounded up to LANES. */
INLINE void attend(Attend a, const float *q, const float *k, const float *v, float *out, int heads, const int32_t *seen, int64_t n,
                   float *scores, int vectors) {
    vf query[HEADS][MAX_VECTORS], acc[HEADS][MAX_VECTORS];
    for (int h = 0; h < HEADS; h++)
        for (int d = 0; d < vectors; d++) {
            query[h][d] = acc[h][d] = splat(0.0f);
            if (h < heads) query[h][d] = *(const vf_any *)(q + h * a.q_head + d * LANES) * splat(a.scale_log2);
        }
    for (int64_t i = 0; i < n; i += SLOTS) {
        vf products[SLOTS * HEADS];
        for (int s = 0; s < SLOTS; s++) {
            const int64_t at = i + s < n ? i + s : n - 1, slot = seen ? seen[at] : at; /* scores beyond n are not looked at */
            const float *key = k + slot * a.k_slot;
            for (int h = 0; h < HEADS; h++) {
                vf product = query[h][0] * *(const vf_any *)key;
                for (int d = 1; d < vectors; d++) product += query[h][d] * *(const vf_any *)(key + d * LANES);
                products[s * HEADS + h] = product;
            }
            for (int d = 0; d < vectors; d++) __builtin_prefetch(v + slot * a.v_slot + d * LANES); /* wanted next */
        }
        *(vf_any *)(scores + i * HEADS) = sums(products);
    }
    const vf inverse = exponentials(scores, n);
    for (int64_t i = 0; i < n; i++) {
        const float *value = v + (seen ? seen[i] : i) * a.v_slot;
        for (int h = 0; h < HEADS; h++)
            for (int d = 0; d < vectors; d++) acc[h][d] += splat(scores[i * HEADS + h]) * *(const vf_any *)(value + d * LANES);
    }
    for (int h = 0; h < heads; h++)
        for (int d = 0; d < vectors; d++) *(vf_any *)(out + h * a.out_head + d * LANES) = acc[h][d] * splat(inverse[h]);
}

/* All `repeats` query heads of a key head, which are `q_head` apart. size: of a head, a multiple of LANES up to LANES * MAX_VECTORS. */
INLINE void attend_group(Attend a, const float *q, const float *k, const float *v, float *out, int64_t repeats, int64_t size,
                         const int32_t *seen, int64_t n, float *scores) {
    for (int64_t first = 0; first < repeats; first += HEADS) {
        const int heads = repeats - first < HEADS ? (int)(repeats - first) : HEADS;
        const float *queries = q + first * a.q_head;
        float *own = out + first * a.out_head;
#define CASE(V) case V: attend(a, queries, k, v, own, heads, seen, n, scores, V); break;
        switch (size / LANES) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(6) CASE(8)
            default: attend(a, queries, k, v, own, heads, seen, n, scores, (int)(size / LANES));
        }
#undef CASE
    }
}
