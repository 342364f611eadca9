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
#include "scan.h"

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
        const float *B = c->B + t * c->bc_step + n, *C = c->C + t * c->bc_step + n;
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
        const float *B = c->B + t * c->bc_step + n, *C = c->C + t * c->bc_step + n;
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
