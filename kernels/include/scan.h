/* Selective scan: the problem, and its forward over one work item, which is a row and a group of channels. */
#pragma once
#include "vectors.h"

#define CHUNK 16      /* steps: what one block of states needs of a chunk stays in the first-level cache */
#define BLOCK 8       /* states in registers at once, with as many decay rates and, in the backward, sums */
#define GROUP_TILES 8 /* channels of a work item, in vectors: small enough to share 384 channels among threads */

typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

typedef struct {
    const void *u, *dt, *z;                       /* (B, L, D); z may be null */
    int64_t u_row, u_step, dt_row, dt_step, z_row, z_step; /* strides in elements */
    const float *A2, *Bm, *Cm;                    /* A log2(e) (N, D); (B, L, N), tokens bc_step elements apart */
    const float *D, *bias;                        /* (D,), may be null */
    const float *h0;                              /* (B, D, N), may be null */
    const uint8_t *start;                         /* (B, L), may be null: the state before this step is dropped */
    void *y;                                      /* (B, L, D) */
    float *final;                                 /* (B, D, N) */
    float *saved;                                 /* (chunks, B, N, D) states before each chunk, may be null */
    /* of the backward */
    const void *dy;                               /* (B, L, D) */
    const float *dfinal;                          /* (B, D, N) */
    void *du, *ddt, *dz;                          /* (B, L, D) */
    float *dBp, *dCp;                             /* (groups, B, L, N) */
    float *dA, *dD, *dbias;                       /* (B, N, D), (B, D), (B, D): to be summed over rows */
    float *dh0;                                   /* (B, D, N), may be null */
    int64_t batch, length, dim, states, bc_step;
    int32_t bf16, softplus, threads;
} Scan;

/* max(x, 0) + log1p(e); log1p(e) = 2 atanh(e / (2 + e)) keeps its relative accuracy for tiny e. Its slope is the sigmoid. */
INLINE void softplus(vf x, vf *value, vf *slope) {
    vf e = exp_minus_abs(x), s = e / (splat(2.0f) + e), q = s * s;
    vf p = splat(2.0f / 13);
    p = p * q + splat(2.0f / 11);
    p = p * q + splat(2.0f / 9);
    p = p * q + splat(2.0f / 7);
    p = p * q + splat(2.0f / 5);
    p = p * q + splat(2.0f / 3);
    p = p * q + splat(2.0f);
    *value = blend(x < splat(0.0f), splat(0.0f), x) + p * s;
    *slope = blend(x < splat(0.0f), e, splat(1.0f)) / (splat(1.0f) + e);
}

/* Element `at` on of an array of activations; lanes from `count` on are 0. */
INLINE vf load(const void *array, int64_t at, int count, int bf16) {
    if (bf16) {
        const uint16_t *p = (const uint16_t *)array + at;
        vh raw = {0};
        if (count == LANES) raw = *(const vh_any *)p;
        else for (int i = 0; i < count; i++) raw[i] = p[i];
        return (vf)(__builtin_convertvector(raw, vu) << 16);
    }
    return load_part((const float *)array + at, count);
}

INLINE void store(void *array, int64_t at, vf v, int count, int bf16) {
    if (bf16) { /* to the nearest, ties to even */
        uint16_t *p = (uint16_t *)array + at;
        vu bits = (vu)v;
        bits += 0x7fff + ((bits >> 16) & 1);
        vh raw = __builtin_convertvector(bits >> 16, vh);
        if (count == LANES) *(vh_any *)p = raw;
        else for (int i = 0; i < count; i++) p[i] = raw[i];
        return;
    }
    store_part((float *)array + at, v, count);
}

/* State of `count` channels from `array` (B, D, N): h[n] holds number n of every channel. 16 numbers of 16 channels go by as one square. */
INLINE void load_state(vf *h, const float *array, int64_t row, int64_t d, const Scan *s, int count) {
    const int64_t N = s->states, squares = WIDE && array && count == LANES ? N / LANES * LANES : 0;
    const float *first = array + (row * s->dim + d) * N;
    for (int64_t n = 0; n < squares; n += LANES) {
        for (int i = 0; i < LANES; i++) h[n + i] = *(const vf_any *)(first + i * N + n);
        transpose(h + n);
    }
    for (int64_t n = squares; n < N; n++) {
        h[n] = splat(0.0f);
        if (array)
            for (int i = 0; i < count; i++) h[n][i] = first[i * N + n];
    }
}

INLINE void store_state(float *array, const vf *h, int64_t row, int64_t d, const Scan *s, int count) {
    const int64_t N = s->states, squares = WIDE && count == LANES ? N / LANES * LANES : 0;
    float *first = array + (row * s->dim + d) * N;
    for (int64_t n = 0; n < squares; n += LANES) {
        vf square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = h[n + i];
        transpose(square);
        for (int i = 0; i < LANES; i++) *(vf_any *)(first + i * N + n) = square[i];
    }
    for (int64_t n = squares; n < N; n++)
        for (int i = 0; i < count; i++) first[i * N + n] = h[n][i];
}

/* What the steps of a chunk need of 16 channels, whatever the state. */
typedef struct {
    vf dt[CHUNK], dtu[CHUNK], u[CHUNK], y[CHUNK]; /* y: D u, to which the blocks add */
    vf slope[CHUNK];                              /* of the softplus */
    vf dy[CHUNK], gB[CHUNK], sA[CHUNK];           /* of the backward: dy times the gate; sums over states */
    const float *B, *C;                           /* (steps, N), steps bc_step apart */
    int64_t bc_step;
    const uint8_t *start;                         /* null where no document starts in the chunk */
    int steps;
} Steps;

INLINE void read_steps(Steps *c, const Scan *s, int64_t row, int64_t first, int64_t d, int count, int bf16) {
    vf D = s->D ? load(s->D, d, count, 0) : splat(0.0f), bias = s->bias ? load(s->bias, d, count, 0) : splat(0.0f);
    c->steps = s->length - first < CHUNK ? (int)(s->length - first) : CHUNK;
    c->bc_step = s->bc_step;
    c->B = s->Bm + (row * s->length + first) * s->bc_step, c->C = s->Cm + (row * s->length + first) * s->bc_step;
    c->start = NULL;
    for (int t = 0; s->start && t < c->steps; t++)
        if (s->start[row * s->length + first + t]) c->start = s->start + row * s->length + first;
    for (int t = 0; t < c->steps; t++) {
        vf raw = load(s->dt, row * s->dt_row + (first + t) * s->dt_step + d, count, bf16) + bias;
        c->dt[t] = raw, c->slope[t] = splat(1.0f);
        if (s->softplus) softplus(raw, &c->dt[t], &c->slope[t]);
        c->u[t] = load(s->u, row * s->u_row + (first + t) * s->u_step + d, count, bf16);
        c->dtu[t] = c->dt[t] * c->u[t], c->y[t] = D * c->u[t];
    }
}

/* `width` states from number n on, over the chunk: h is advanced, y gets its sum. width is a constant where this is inlined. */
INLINE void forward_block(Steps *c, vf *h, const vf *A2, int64_t N, int64_t n, int width) {
    vf r[BLOCK], a[BLOCK];
    for (int i = 0; i < width; i++) r[i] = h[n + i], a[i] = A2[n + i];
    for (int t = 0; t < c->steps; t++) {
        const float *B = c->B + t * c->bc_step + n, *C = c->C + t * c->bc_step + n;
        if (c->start && c->start[t])
            for (int i = 0; i < width; i++) r[i] = splat(0.0f);
        vf dt = c->dt[t], dtu = c->dtu[t], even = c->y[t], odd = splat(0.0f);
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) {
            r[i] = exp2v(dt * a[i]) * r[i] + dtu * B[i];
            if (i & 1) odd += r[i] * C[i];
            else even += r[i] * C[i];
        }
        c->y[t] = even + odd;
    }
    for (int i = 0; i < width; i++) h[n + i] = r[i];
}

INLINE void forward_tile(const Scan *s, int64_t row, int64_t d, int count, int bf16) {
    int64_t N = s->states, n;
    vf h[N], A2[N];
    Steps c;
    load_state(h, s->h0, row, d, s, count);
    for (n = 0; n < N; n++) A2[n] = load(s->A2, n * s->dim + d, count, 0);
    for (int64_t first = 0; first < s->length; first += CHUNK) {
        for (n = 0; s->saved && n < N; n++) store(s->saved, ((first / CHUNK * s->batch + row) * N + n) * s->dim + d, h[n], count, 0);
        read_steps(&c, s, row, first, d, count, bf16);
        for (n = 0; n + BLOCK <= N; n += BLOCK) forward_block(&c, h, A2, N, n, BLOCK);
        for (; n < N; n++) forward_block(&c, h, A2, N, n, 1);
        for (int t = 0; t < c.steps; t++) {
            if (s->z) {
                vf z = load(s->z, row * s->z_row + (first + t) * s->z_step + d, count, bf16);
                c.y[t] *= z * sigmoid(z);
            }
            store(s->y, (row * s->length + first + t) * s->dim + d, c.y[t], count, bf16);
        }
    }
    store_state(s->final, h, row, d, s, count);
}

INLINE int lanes(const Scan *s, int64_t d) { return s->dim - d < LANES ? (int)(s->dim - d) : LANES; }

INLINE void forward_item(const Scan *s, int64_t row, int64_t group, int bf16) {
    int64_t first = group * GROUP_TILES * LANES, end = first + GROUP_TILES * LANES;
    for (int64_t d = first; d < end && d < s->dim; d += LANES) {
        if (lanes(s, d) == LANES) forward_tile(s, row, d, LANES, bf16);
        else forward_tile(s, row, d, lanes(s, d), bf16);
    }
}
