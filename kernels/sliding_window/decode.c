/* Attention of a few queries against a cache on a CPU; called by cpu.py, which holds the contract.
 *
 * Work items are (row, key head): the slots that a query sees are listed first, in their order, and each key and value is then read once for
 * all query heads of the group. Sums run over that list alone, so a row's result, to the last bit, depends neither on the other rows nor on
 * slots that it does not see, and these are never read. Vectors run over 16 numbers of a head (gcc's vector extensions).
 */
#include <stdlib.h>
#include <string.h>
#include "attend.h"

typedef struct {
    const float *q, *k, *v;                             /* (B, H, T, K), (B, G, S, K): K next to each other */
    int64_t q_row, q_head, q_step, k_row, k_head, k_slot, v_row, v_head, v_slot; /* strides in elements */
    const int64_t *key_positions, *query_positions;     /* (B, S), (B, T) contiguous; -1: an empty slot */
    float *out;                                         /* (B, H, T, K) contiguous */
    int64_t batch, heads, groups, length, slots, size, window; /* window 0: none */
    float scale_log2;                                   /* of the scores, times log2(e) */
    int32_t threads;
} Cached;

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
    const Attend shape = {c->q_head, c->k_slot, c->v_slot, c->length * c->size, c->scale_log2};
    for (int64_t t = 0; t < c->length; t++) {
        const int64_t n = visible(c, row, t, seen);
        const float *q = c->q + row * c->q_row + group * repeats * c->q_head + t * c->q_step;
        float *out = c->out + ((row * c->heads + group * repeats) * c->length + t) * c->size;
        if (n > 0) attend_group(shape, q, k, v, out, repeats, c->size, seen, n, scores);
        else
            for (int64_t h = 0; h < repeats; h++) memset(out + h * shape.out_head, 0, c->size * sizeof(float));
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
