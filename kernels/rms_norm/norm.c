/* RMS normalisation in float32 on a CPU, alone or behind a sum; called by cpu.py, which holds the contract.
 * A row's result depends on it alone. */
#include "norm.h"

typedef struct {
    const float *x, *residual, *weight; /* (M, D) with rows apart as below, residual may be null; (D,) */
    float *total, *out;                 /* (M, D) contiguous; total: x + residual, null without one */
    int64_t rows, size, x_row, residual_row;
    float eps;
    int32_t threads;
} Norm;

void rms_norm_forward(const Norm *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->rows * p->size > 1 << 16)
    for (int64_t row = 0; row < p->rows; row++) {
        const float *residual = p->residual ? p->residual + row * p->residual_row : 0;
        float *total = p->residual ? p->total + row * p->size : 0;
        normalise(p->x + row * p->x_row, residual, total, p->weight, p->out + row * p->size, p->size, p->eps);
    }
}
