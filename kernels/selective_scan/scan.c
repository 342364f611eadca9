/* Selective scan on a CPU, forward and backward; called by cpu.py, which holds the contract.
 *
 * Vectors run over 16 channels, so that no step needs a sum across lanes but those of dB and dC, which are taken once a chunk. Work items
 * are (row, group of channels); what the items of one row share, dB and dC, is written to partials of a group, so that results do not
 * depend on the number of threads.
 *
 * Activations (u, dt, z, y and their gradients) are float or bfloat16, element 1 apart along channels; everything else is float.
 */
#include <stdlib.h>
#include <string.h>
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
    const float *A2, *Bm, *Cm;                    /* A log2(e) (N, D); (B, L, N) contiguous */
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
    int64_t batch, length, dim, states;
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
    const float *p = (const float *)array + at;
    if (count == LANES) return *(const vf_any *)p;
    vf v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
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
    float *p = (float *)array + at;
    if (count == LANES) *(vf_any *)p = v;
    else for (int i = 0; i < count; i++) p[i] = v[i];
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
    const float *B, *C;                           /* (steps, N) */
    const uint8_t *start;                         /* null where no document starts in the chunk */
    int steps;
} Steps;

INLINE void read_steps(Steps *c, const Scan *s, int64_t row, int64_t first, int64_t d, int count, int bf16) {
    vf D = s->D ? load(s->D, d, count, 0) : splat(0.0f), bias = s->bias ? load(s->bias, d, count, 0) : splat(0.0f);
    c->steps = s->length - first < CHUNK ? (int)(s->length - first) : CHUNK;
    c->B = s->Bm + (row * s->length + first) * s->states, c->C = s->Cm + (row * s->length + first) * s->states;
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
        const float *B = c->B + t * N + n, *C = c->C + t * N + n;
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

/* Work space of the backward of one item. */
typedef struct {
    vf *accB, *accC; /* (CHUNK, N): dB and dC before the sum over lanes */
    vf *carry, *dA;  /* (tiles, N): gradient of the state after the chunk; sum over time */
    vf *dD, *dbias;  /* (tiles,) */
} Work;

/* `width` states from number n on: the chunk's states again from `before`, then its steps from last to first. */
INLINE void backward_block(Steps *c, vf *accB, vf *accC, vf *carry, vf *dA, const vf *before, const vf *A2, int64_t N, int64_t n,
                           int width) {
    vf r[BLOCK], a[BLOCK], sums[BLOCK], h[CHUNK][2 * BLOCK];
    for (int i = 0; i < width; i++) r[i] = before[n + i], a[i] = A2[n + i];
    for (int t = 0; t < c->steps; t++) {
        const float *B = c->B + t * N + n, *C = c->C + t * N + n;
        vf *acc = accC + t * N + n, dt = c->dt[t], dtu = c->dtu[t], dy = c->dy[t], even = c->y[t], odd = splat(0.0f);
        if (c->start && c->start[t])
            for (int i = 0; i < width; i++) r[i] = splat(0.0f);
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) {
            h[t][i] = r[i];
            h[t][BLOCK + i] = exp2v(dt * a[i]);
            r[i] = h[t][BLOCK + i] * r[i] + dtu * B[i];
            acc[i] += r[i] * dy;
            if (i & 1) odd += r[i] * C[i];
            else even += r[i] * C[i];
        }
        c->y[t] = even + odd;
    }
    for (int i = 0; i < width; i++) r[i] = carry[n + i], sums[i] = dA[n + i];
    for (int t = c->steps - 1; t >= 0; t--) {
        const float *B = c->B + t * N + n, *C = c->C + t * N + n;
        vf *acc = accB + t * N + n, dt = c->dt[t], dtu = c->dtu[t], dy = c->dy[t], gB = c->gB[t], sA = c->sA[t];
        int alone = c->start && c->start[t]; /* nothing goes back from here; not by a decay of 0, which infinity and NaN would survive */
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) {
            vf G = dy * C[i] + r[i]; /* gradient of the state after step t */
            acc[i] += G * dtu;
            gB += G * B[i];
            r[i] = h[t][BLOCK + i] * G;
        }
        if (alone)
            for (int i = 0; i < width; i++) r[i] = splat(0.0f);
        else
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) {
                vf sn = r[i] * h[t][i]; /* gradient of dt A */
                sA += sn * a[i];
                sums[i] += sn * dt;
            }
        c->gB[t] = gB, c->sA[t] = sA;
    }
    for (int i = 0; i < width; i++) carry[n + i] = r[i], dA[n + i] = sums[i];
}

INLINE void backward_chunk(const Scan *s, const Work *w, int64_t row, int64_t d, int tile, int64_t first, int count, int bf16) {
    int64_t N = s->states, n;
    vf before[N], A2[N], *carry = w->carry + tile * N, *dA = w->dA + tile * N;
    vf D = s->D ? load(s->D, d, count, 0) : splat(0.0f), z[CHUNK], raw_dy[CHUNK];
    Steps c;
    for (n = 0; n < N; n++) {
        A2[n] = load(s->A2, n * s->dim + d, count, 0);
        before[n] = load(s->saved, ((first / CHUNK * s->batch + row) * N + n) * s->dim + d, count, 0);
    }
    read_steps(&c, s, row, first, d, count, bf16);
    for (int t = 0; t < c.steps; t++) {
        c.gB[t] = c.sA[t] = splat(0.0f);
        c.dy[t] = raw_dy[t] = load(s->dy, (row * s->length + first + t) * s->dim + d, count, bf16);
        if (!s->z) continue;
        z[t] = load(s->z, row * s->z_row + (first + t) * s->z_step + d, count, bf16);
        c.dy[t] *= z[t] * sigmoid(z[t]);
    }
    for (n = 0; n + BLOCK <= N; n += BLOCK) backward_block(&c, w->accB, w->accC, carry, dA, before, A2, N, n, BLOCK);
    for (; n < N; n++) backward_block(&c, w->accB, w->accC, carry, dA, before, A2, N, n, 1);
    for (int t = 0; t < c.steps; t++) {
        int64_t at = (row * s->length + first + t) * s->dim + d;
        vf ddt = (c.sA[t] * splat(0.69314718f) + c.gB[t] * c.u[t]) * c.slope[t]; /* A2 = A / ln 2 */
        store(s->ddt, at, ddt, count, bf16);
        store(s->du, at, c.gB[t] * c.dt[t] + D * c.dy[t], count, bf16);
        w->dbias[tile] += ddt, w->dD[tile] += c.dy[t] * c.u[t];
        if (!s->z) continue;
        vf gate = sigmoid(z[t]);
        store(s->dz, at, raw_dy[t] * c.y[t] * gate * (splat(1.0f) + z[t] * (splat(1.0f) - gate)), count, bf16);
    }
}

INLINE float lanes_sum(vf v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

INLINE int lanes(const Scan *s, int64_t d) { return s->dim - d < LANES ? (int)(s->dim - d) : LANES; }

INLINE void backward_item(const Scan *s, int64_t row, int64_t group, int bf16) {
    int64_t N = s->states, first_d = group * GROUP_TILES * LANES;
    int64_t tiles = (s->dim - first_d + LANES - 1) / LANES;
    if (tiles > GROUP_TILES) tiles = GROUP_TILES;
    int64_t vectors = 2 * CHUNK * N + 2 * tiles * N + 2 * tiles;
    vf *space = aligned_alloc(64, vectors * sizeof(vf));
    if (!space) abort(); /* some 70 KiB */
    memset(space, 0, vectors * sizeof(vf));
    Work w = {.accB = space, .accC = space + CHUNK * N};
    w.carry = w.accC + CHUNK * N, w.dA = w.carry + tiles * N, w.dD = w.dA + tiles * N, w.dbias = w.dD + tiles;
    for (int tile = 0; tile < tiles; tile++) {
        int64_t d = first_d + tile * LANES;
        load_state(w.carry + tile * N, s->dfinal, row, d, s, lanes(s, d));
    }
    for (int64_t first = (s->length - 1) / CHUNK * CHUNK; first >= 0; first -= CHUNK) {
        memset(w.accB, 0, 2 * CHUNK * N * sizeof(vf));
        for (int tile = 0; tile < tiles; tile++) {
            int64_t d = first_d + tile * LANES;
            if (lanes(s, d) == LANES) backward_chunk(s, &w, row, d, tile, first, LANES, bf16);
            else backward_chunk(s, &w, row, d, tile, first, lanes(s, d), bf16);
        }
        int64_t steps = s->length - first < CHUNK ? s->length - first : CHUNK;
        int64_t at = ((group * s->batch + row) * s->length + first) * N;
        for (int64_t i = 0; i < steps * N; i++) s->dBp[at + i] = lanes_sum(w.accB[i]), s->dCp[at + i] = lanes_sum(w.accC[i]);
    }
    for (int tile = 0; tile < tiles; tile++) {
        int64_t d = first_d + tile * LANES;
        int count = lanes(s, d);
        for (int64_t n = 0; n < N; n++) store(s->dA, (row * N + n) * s->dim + d, w.dA[tile * N + n], count, 0);
        store(s->dD, row * s->dim + d, w.dD[tile], count, 0);
        store(s->dbias, row * s->dim + d, w.dbias[tile], count, 0);
        if (s->dh0) store_state(s->dh0, w.carry + tile * N, row, d, s, count);
    }
    free(space);
}

INLINE void forward_item(const Scan *s, int64_t row, int64_t group, int bf16) {
    int64_t first = group * GROUP_TILES * LANES, end = first + GROUP_TILES * LANES;
    for (int64_t d = first; d < end && d < s->dim; d += LANES) {
        if (lanes(s, d) == LANES) forward_tile(s, row, d, LANES, bf16);
        else forward_tile(s, row, d, lanes(s, d), bf16);
    }
}

/* One function a kind of activation, so that the test for it leaves the loops. */
#define DIRECTION(name) \
    static __attribute__((noinline)) void name##_float(const Scan *s, int64_t row, int64_t group) { name##_item(s, row, group, 0); } \
    static __attribute__((noinline)) void name##_bf16(const Scan *s, int64_t row, int64_t group) { name##_item(s, row, group, 1); } \
    void selective_scan_##name(const Scan *s) { \
        void (*item)(const Scan *, int64_t, int64_t) = s->bf16 ? name##_bf16 : name##_float; \
        int64_t groups = (s->dim + GROUP_TILES * LANES - 1) / (GROUP_TILES * LANES), items = s->batch * groups; \
        int threads = items < s->threads ? (int)items : s->threads; \
        (void)threads; \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if(threads > 1)") \
        for (int64_t i = 0; i < items; i++) item(s, i / groups, i % groups); \
    }

DIRECTION(forward)
DIRECTION(backward)

int64_t selective_scan_group_channels(void) { return GROUP_TILES * LANES; }
int64_t selective_scan_chunk(void) { return CHUNK; }
