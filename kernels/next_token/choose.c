/* The most likely allowed token of each row, and log-probabilities, in float32 on a CPU; called by cpu.py, which holds the contract. */
#include <math.h>
#include "vectors.h"

#define CHUNK 1024 /* numbers whose sum is taken for itself: long sums lose accuracy */

typedef int8_t vb __attribute__((vector_size(16), aligned(1), may_alias));

typedef struct {
    const float *logits;    /* (B, V), rows logits_row apart */
    const uint8_t *blocked; /* (V,) or (B, V), may be null */
    int64_t *ids;           /* (B, n); to choose, n is 1 and they are written */
    float *logprobs;        /* (B, n) */
    int64_t rows, size, count, logits_row, blocked_row;
    int32_t choose, threads;
} Choice;

static float largest(vf x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

/* The first of the largest numbers that are not blocked, 0 where all are. */
static int64_t best(const float *x, const uint8_t *blocked, int64_t size) {
    const int64_t whole = size / LANES * LANES;
    vf tops = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf v = *(const vf_any *)(x + i);
        const vi out = blocked ? __builtin_convertvector(*(const vb *)(blocked + i), vi) != 0 : (vi){0};
        tops = larger(blend(out, splat(-INFINITY), v), tops);
    }
    float top = largest(tops);
    for (int64_t i = whole; i < size; i++) top = x[i] > top && !(blocked && blocked[i]) ? x[i] : top;
    for (int64_t id = 0; id < size; id++)
        if (x[id] == top && !(blocked && blocked[id])) return id;
    return 0;
}

static float log_sum_exp(const float *x, int64_t size) {
    const int64_t whole = size / LANES * LANES;
    vf tops = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += LANES) tops = larger(*(const vf_any *)(x + i), tops);
    float top = largest(tops), sum = 0.0f;
    for (int64_t i = whole; i < size; i++) top = x[i] > top ? x[i] : top;
    for (int64_t first = 0; first < whole; first += CHUNK) {
        vf sums = splat(0.0f);
        for (int64_t i = first; i < whole && i < first + CHUNK; i += LANES)
            sums += exp2v((*(const vf_any *)(x + i) - splat(top)) * splat(1.44269504f));
        for (int i = 0; i < LANES; i++) sum += sums[i];
    }
    for (int64_t i = whole; i < size; i++) sum += exp2v((splat(x[i]) - splat(top)) * splat(1.44269504f))[0];
    return top + logf(sum);
}

void next_token(const Choice *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->rows * p->size > 1 << 17)
    for (int64_t row = 0; row < p->rows; row++) {
        const float *x = p->logits + row * p->logits_row, total = log_sum_exp(x, p->size);
        int64_t *ids = p->ids + row * p->count;
        if (p->choose) *ids = best(x, p->blocked ? p->blocked + row * p->blocked_row : 0, p->size);
        for (int64_t i = 0; i < p->count; i++) p->logprobs[row * p->count + i] = x[ids[i]] - total;
    }
}
