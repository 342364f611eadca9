/* Rows times a packed weight, in float32.
 *
 * A weight (N, K) is packed in panels of PANEL outputs, (K, PANEL) each, the last one filled up with zeros. Each number of a result is one
 * chain of multiply-adds over K in their order, whatever the tile that it lies in: a row has the same bits whatever other rows there are.
 */
#pragma once
#include "vectors.h"

#define PANEL 32
#define VECTORS (PANEL / LANES)
#define ROWS 12 /* of a tile: 24 of AVX-512's 32 registers are sums. 12 x 32 measured as fast as 6 x 64 and 14 x 32 */
#define DEPTH 512 /* of K at a time: a panel's part is 64 KB, the rows' 24 KB */
#define BLOCK_ROWS 96 /* of a work item, so that many threads find work in few panels */

typedef struct {
    const float *panels, *bias; /* 64-byte aligned; bias: (N,), may be null */
    int64_t outputs, inputs;    /* N, K */
} Packed;

INLINE void tile(int rows, int64_t depth, const float *x, int64_t x_row, const float *panel, float *partial, int first, const float *next) {
    vf acc[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = first ? splat(0.0f) : *(vf *)(partial + r * PANEL + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vf w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = *(const vf *)(panel + k * PANEL + v * LANES);
        if (next)
            for (int v = 0; v < VECTORS; v++) __builtin_prefetch(next + k * PANEL + v * LANES, 0, 2);
        for (int r = 0; r < rows; r++) {
            const vf a = splat(x[r * x_row + k]);
            for (int v = 0; v < VECTORS; v++) acc[r][v] += a * w[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) *(vf *)(partial + r * PANEL + v * LANES) = acc[r][v];
}

/* One panel for up to BLOCK_ROWS rows. partial: (BLOCK_ROWS, PANEL), aligned. add: to what is in out.
 * more: another panel follows, and is fetched meanwhile. */
static void panel_product(const Packed *w, int64_t panel, const float *x, int64_t x_row, int64_t rows, float *out, int64_t out_row,
                          float *partial, int add, int more) {
    const float *weights = w->panels + panel * w->inputs * PANEL;
    for (int64_t k = 0; k < w->inputs; k += DEPTH) {
        const int64_t depth = w->inputs - k < DEPTH ? w->inputs - k : DEPTH;
        const float *part = weights + k * PANEL;
        for (int64_t r = 0; r < rows; r += ROWS) {
#define TILE(n, next) tile(n, depth, x + r * x_row + k, x_row, part, partial + r * PANEL, k == 0, next)
#define CASE(n) case n: TILE(n, 0); break;
            if (rows - r >= ROWS) { /* fewer rows wait for memory anyway */
                if (more && r == 0) TILE(ROWS, part + w->inputs * PANEL);
                else TILE(ROWS, 0);
            } else switch (rows - r) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
            }
#undef CASE
#undef TILE
        }
    }
    const int64_t first = panel * PANEL, width = w->outputs - first < PANEL ? w->outputs - first : PANEL;
    for (int64_t r = 0; r < rows; r++) {
        float *own = partial + r * PANEL, *result = out + r * out_row + first;
        if (w->bias)
            for (int i = 0; i < width; i++) own[i] += w->bias[first + i];
        if (width < PANEL)
            for (int i = 0; i < width; i++) result[i] = add ? result[i] + own[i] : own[i];
        else
            for (int i = 0; i < PANEL; i += LANES) {
                vf value = *(vf *)(own + i);
                if (add) value += *(vf_any *)(result + i);
                *(vf_any *)(result + i) = value;
            }
    }
}

/* out (M, N) = x (M, K) w^T + bias, or, to `add`, what out was plus that; rows `x_row` and `out_row` elements apart. */
static void product(const Packed *w, const float *x, int64_t x_row, int64_t rows, float *out, int64_t out_row, int add, int threads) {
    const int64_t panels = (w->outputs + PANEL - 1) / PANEL, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * w->outputs * w->inputs > 1 << 18)
    for (int64_t item = 0; item < blocks * panels; item++) {
        const int64_t row = item / panels * BLOCK_ROWS, panel = item % panels, count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
        float partial[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
        panel_product(w, panel, x + row * x_row, x_row, count, out + row * out_row, out_row, partial, add, panel + 1 < panels);
    }
}
