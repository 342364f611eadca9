/* Causal convolution of few taps in float32: see kernels.causal_conv1d. */
#pragma once
#include "vectors.h"

#define MAX_TAPS 16

typedef struct {
    const float *x, *weight, *bias, *history; /* (B, L, D) with channels next to each other; (D, W), (D,) or null, (B, W-1, D) or null */
    float *out, *state;                       /* (B, L, D), (B, W-1, D), contiguous */
    int64_t batch, length, dim, taps, x_row, x_step;
    int32_t silu, threads;
} Conv;

/* Channels d to d + count of a row. */
INLINE void convolve(const Conv *p, int64_t row, int64_t d, int count, const vf *weight, vf bias, int taps) {
    vf inputs[MAX_TAPS]; /* the last of them, oldest first */
    for (int k = 0; k < taps - 1; k++)
        inputs[k] = p->history ? load_part(p->history + (row * (taps - 1) + k) * p->dim + d, count) : splat(0.0f);
    for (int64_t t = 0; t < p->length; t++) {
        inputs[taps - 1] = load_part(p->x + row * p->x_row + t * p->x_step + d, count);
        vf sum = bias;
        for (int k = 0; k < taps; k++) sum += inputs[k] * weight[k];
        store_part(p->out + (row * p->length + t) * p->dim + d, p->silu ? sum * sigmoid(sum) : sum, count);
        for (int k = 0; k < taps - 1; k++) inputs[k] = inputs[k + 1];
    }
    for (int k = 0; k < taps - 1; k++) store_part(p->state + (row * (taps - 1) + k) * p->dim + d, inputs[k], count);
}

/* taps: at most MAX_TAPS. state may be history: what a channel needs of it is read before it is written. */
static void convolve_all(const Conv *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->batch * p->length * p->dim > 1 << 16)
    for (int64_t d = 0; d < p->dim; d += LANES) {
        const int count = p->dim - d < LANES ? (int)(p->dim - d) : LANES;
        vf weight[MAX_TAPS];
        for (int64_t k = 0; k < p->taps; k++)
            for (int i = 0; i < LANES; i++) weight[k][i] = i < count ? p->weight[(d + i) * p->taps + k] : 0.0f;
        const vf bias = p->bias ? load_part(p->bias + d, count) : splat(0.0f);
        for (int64_t row = 0; row < p->batch; row++) {
            if (p->taps == 4 && count == LANES) convolve(p, row, d, LANES, weight, bias, 4);
            else convolve(p, row, d, count, weight, bias, (int)p->taps);
        }
    }
}
