/* Layers of a decoder over packed weights, without gradients, in float32 on a CPU; called by cpu.py, which holds the contract.
 *
 * A row's results, to the last bit, depend on that row alone: see product.h and attend.h.
 */
#include <stdlib.h>
#include "attend.h"
#include "convolve.h"
#include "norm.h"
#include "product.h"
#include "rotate.h"
#include "scan.h"

#define QUERIES 16 /* of a work item of attention */

typedef struct {
    Packed weight;
    const float *x; /* (M, K), rows x_row apart */
    float *out;     /* (M, N) contiguous */
    int64_t rows, x_row;
    int32_t threads;
} Linear;

typedef struct {
    Packed gate_up, down;      /* (2F, D), the gate first; (D, F) */
    const float *norm;         /* (D,), its weight before them, of x plus the residual; null: no norm and no residual */
    const float *x, *residual; /* (M, D), rows x_row and residual_row apart */
    float *work, *out;         /* (M, 2F + D), any content; (M, D) contiguous */
    int64_t rows, x_row, residual_row;
    float eps;
    int32_t threads;
} Mlp;

typedef struct {
    Packed qkv, o;           /* ((H+2G)K, D), (D, H K) */
    const float *norm;       /* (D,), its weight before them; null: no norm */
    const float *x;          /* (B T, D), rows x_row apart */
    const float *cos, *sin;  /* (B or 1, T, R/2) contiguous, null: no positions */
    float *keys, *values;    /* (B, G, S, K), K next to each other: updated */
    const int64_t *position; /* (B,) of the first new token of each row, position_row apart */
    float *work, *out;       /* (B T, (H+2G)K + H K + D), any content; (B T, D) contiguous */
    int64_t x_row, row, head, slot, position_row, table_row; /* row, head, slot: of the caches; table_row 0: one table for all rows */
    int64_t batch, length, heads, groups, size, half, slots, window; /* window 0: none */
    float scale_log2, eps;
    int32_t fresh, threads; /* fresh: no row has read anything yet */
} Attention;

typedef struct {
    Packed in, low, dt, out;  /* (2C, E), inputs then gates; (R + 2N, C); (C, R); (E, C) */
    const float *conv_weight, *conv_bias, *A2, *D, *bias; /* (C, W), (C,); A log2(e) (N, C); (C,), (C,) */
    const float *norm, *x;    /* (E,), its weight before them, null: no norm; (B L, E), rows x_row apart */
    float *history, *state;   /* (B, W-1, C), (B, C, N): updated */
    float *work, *result;     /* (B L, 4C + R + 2N + E), any content; (B L, E) contiguous */
    int64_t x_row, batch, length, taps, states;
    float eps;
    int32_t threads;
} Mamba;

int packed_panel(void) { return PANEL; }

int packed_max_taps(void) { return MAX_TAPS; }

/* Whether a tile's sums are registers; where they are not, oneDNN is faster. */
int packed_suits(void) { return WIDE; }

void packed_linear(const Linear *p) { product(&p->weight, p->x, p->x_row, p->rows, p->out, p->weight.outputs, 0, p->threads); }

/* silu(gate) * up into the gate's place. */
static void gate(float *gates, const float *ups, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vf g = *(vf_any *)(gates + i);
        *(vf_any *)(gates + i) = g * sigmoid(g) * *(const vf_any *)(ups + i);
    }
    for (; i < size; i++) gates[i] = (splat(gates[i]) * sigmoid(splat(gates[i])))[0] * ups[i];
}

/* Rows of x, or of x plus a residual, normalised into out; the sums go to `total`. */
static void norm_rows(const float *weight, float eps, const float *x, int64_t x_row, const float *residual, int64_t residual_row,
                      float *total, float *out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > 1 << 16)
    for (int64_t row = 0; row < rows; row++) {
        const float *other = residual ? residual + row * residual_row : 0;
        normalise(x + row * x_row, other, residual ? total + row * size : 0, weight, out + row * size, size, eps);
    }
}

void packed_mlp(const Mlp *p) {
    const int64_t size = p->down.inputs, width = p->down.outputs, rows = p->rows;
    float *hidden = p->work, *normed = p->norm ? p->work + rows * 2 * size : 0;
    if (normed) norm_rows(p->norm, p->eps, p->x, p->x_row, p->residual, p->residual_row, p->out, normed, rows, width, p->threads);
    product(&p->gate_up, normed ? normed : p->x, normed ? width : p->x_row, rows, hidden, 2 * size, 0, p->threads);
#pragma omp parallel for num_threads(p->threads) schedule(static) if (rows * size > 1 << 16)
    for (int64_t row = 0; row < rows; row++) gate(hidden + row * 2 * size, hidden + (row * 2 + 1) * size, size);
    product(&p->down, hidden, 2 * size, rows, p->out, width, normed != 0, p->threads);
}

/* Turn queries and keys of a row in place. */
static void turn(const Attention *p, int64_t row, int64_t t) {
    const int64_t angles = row * p->table_row + t * p->half, turning = p->heads + p->groups;
    float *x = p->work + (row * p->length + t) * (turning + p->groups) * p->size;
    for (int64_t head = 0; head < turning; head++)
        rotate_head(x + head * p->size, p->cos + angles, p->sin + angles, x + head * p->size, p->half, p->size);
}

static void write(const Attention *p, int64_t row, int64_t t) {
    const float *k = p->work + ((row * p->length + t) * (p->heads + 2 * p->groups) + p->heads) * p->size, *v = k + p->groups * p->size;
    const int64_t place = row * p->row + (p->position[row * p->position_row] + t) % p->slots * p->slot;
    for (int64_t g = 0; g < p->groups; g++) {
        memcpy(p->keys + place + g * p->head, k + g * p->size, p->size * sizeof(float));
        memcpy(p->values + place + g * p->head, v + g * p->size, p->size * sizeof(float));
    }
}

/* Queries `first` to `last` of a row, all heads of one group. Rows that are fresh look at their own tokens, others at the cache. */
static void mix(const Attention *p, int64_t row, int64_t group, int64_t first, int64_t last, float *mixed, float *scores) {
    const int64_t repeats = p->heads / p->groups, width = (p->heads + 2 * p->groups) * p->size;
    const float *tokens = p->work + row * p->length * width;
    for (int64_t t = first; t < last; t++) {
        const float *q = tokens + t * width + group * repeats * p->size;
        float *out = mixed + ((row * p->length + t) * p->heads + group * repeats) * p->size;
        if (p->fresh) {
            const int64_t oldest = p->window && t >= p->window ? t - p->window + 1 : 0;
            const float *k = tokens + oldest * width + (p->heads + group) * p->size;
            const Attend shape = {p->size, width, width, p->size, p->scale_log2};
            attend_group(shape, q, k, k + p->groups * p->size, out, repeats, p->size, 0, t + 1 - oldest, scores);
        } else {
            const int64_t seen = p->position[row * p->position_row] + t + 1;
            const int64_t place = row * p->row + group * p->head;
            const Attend shape = {p->size, p->slot, p->slot, p->size, p->scale_log2};
            attend_group(shape, q, p->keys + place, p->values + place, out, repeats, p->size, 0, seen < p->slots ? seen : p->slots, scores);
        }
    }
}

/* Returns 0, or 1 where there is no memory. */
int packed_attention(const Attention *p) {
    const int64_t tokens = p->batch * p->length, pieces = (p->length + QUERIES - 1) / QUERIES, items = p->batch * p->groups * pieces;
    const int64_t most = p->fresh && p->length > p->slots ? p->length : p->slots, padded = (most + LANES - 1) / LANES * LANES;
    const int64_t kept = p->length < p->slots ? p->length : p->slots;
    int failed = 0;
    float *mixed = p->work + tokens * p->qkv.outputs, *normed = p->norm ? mixed + tokens * p->o.inputs : 0;
    if (normed) norm_rows(p->norm, p->eps, p->x, p->x_row, 0, 0, 0, normed, tokens, p->qkv.inputs, p->threads);
    product(&p->qkv, normed ? normed : p->x, normed ? p->qkv.inputs : p->x_row, tokens, p->work, p->qkv.outputs, 0, p->threads);
#pragma omp parallel num_threads(p->threads) if (items > 1)
    {
        float *scores = malloc(HEADS * padded * sizeof(float));
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            const int64_t row = token / p->length, t = token % p->length;
            if (p->cos) turn(p, row, t);
            if (t >= p->length - kept) write(p, row, t);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) {
            const int64_t first = item % pieces * QUERIES, last = first + QUERIES < p->length ? first + QUERIES : p->length;
            if (scores) mix(p, item / pieces / p->groups, item / pieces % p->groups, first, last, mixed, scores);
        }
        free(scores);
    }
    if (!failed) product(&p->o, mixed, p->heads * p->size, tokens, p->out, p->o.outputs, 0, p->threads);
    return failed;
}

void packed_mamba(const Mamba *p) {
    const int64_t tokens = p->batch * p->length, channels = p->out.inputs, width = p->in.inputs, rank = p->dt.inputs, low_row = p->low.outputs;
    float *wide = p->work, *u = wide + tokens * 2 * channels, *dt = u + tokens * channels;
    float *low = dt + tokens * channels, *normed = p->norm ? low + tokens * low_row : 0;
    if (normed) norm_rows(p->norm, p->eps, p->x, p->x_row, 0, 0, 0, normed, tokens, width, p->threads);
    product(&p->in, normed ? normed : p->x, normed ? width : p->x_row, tokens, wide, 2 * channels, 0, p->threads);
    const Conv conv = {
        .x = wide, .weight = p->conv_weight, .bias = p->conv_bias, .history = p->history, .out = u, .state = p->history,
        .batch = p->batch, .length = p->length, .dim = channels, .taps = p->taps, .x_row = p->length * 2 * channels, .x_step = 2 * channels,
        .silu = 1, .threads = p->threads,
    };
    convolve_all(&conv);
    product(&p->low, u, channels, tokens, low, low_row, 0, p->threads);
    product(&p->dt, low, low_row, tokens, dt, channels, 0, p->threads);
    const Scan scan = {
        .u = u, .dt = dt, .z = wide + channels, .u_row = p->length * channels, .u_step = channels, .dt_row = p->length * channels,
        .dt_step = channels, .z_row = p->length * 2 * channels, .z_step = 2 * channels, .A2 = p->A2, .Bm = low + rank,
        .Cm = low + rank + p->states, .D = p->D, .bias = p->bias, .h0 = p->state, .y = u, .final = p->state, /* each is read first */
        .batch = p->batch, .length = p->length, .dim = channels, .states = p->states, .bc_step = low_row, .softplus = 1,
    };
    const int64_t groups = (channels + GROUP_TILES * LANES - 1) / (GROUP_TILES * LANES), items = p->batch * groups;
#pragma omp parallel for num_threads(p->threads) schedule(static) if (tokens * channels > 1 << 12)
    for (int64_t item = 0; item < items; item++) forward_item(&scan, item / groups, item % groups, 0);
    product(&p->out, u, channels, tokens, p->result, p->out.outputs, 0, p->threads);
}
