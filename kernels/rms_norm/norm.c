/* RMS normalisation in float32 on a CPU, alone or behind a sum; called by cpu.py, which holds the contract. A row's result depends on it alone. */
#include <math.h>
#include <stdint.h>

#define LANES 16
typedef float vf __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
    const float *x, *residual, *weight; /* (M, D) with rows apart as below, residual may be null; (D,) */
    float *total, *out;                 /* (M, D) contiguous; total: x + residual, null without one */
    int64_t rows, size, x_row, residual_row;
    float eps;
    int32_t threads;
} Norm;

static void normalise(const Norm *p, int64_t row) {
    const float *x = p->x + row * p->x_row;
    float *out = p->out + row * p->size, square = 0.0f;
    const int64_t whole = p->size / LANES * LANES;
    vf squares = {0};
    if (p->residual) {
        const float *residual = p->residual + row * p->residual_row;
        float *total = p->total + row * p->size;
        for (int64_t i = 0; i < whole; i += LANES) *(vf_any *)(total + i) = *(const vf_any *)(residual + i) + *(const vf_any *)(x + i);
        for (int64_t i = whole; i < p->size; i++) total[i] = residual[i] + x[i];
        x = total;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        vf value = *(const vf_any *)(x + i);
        squares += value * value;
    }
    for (int64_t i = whole; i < p->size; i++) square += x[i] * x[i];
    for (int i = 0; i < LANES; i++) square += squares[i];
    const float scale = 1.0f / sqrtf(square / (float)p->size + p->eps);
    for (int64_t i = 0; i < whole; i += LANES) *(vf_any *)(out + i) = *(const vf_any *)(x + i) * scale * *(const vf_any *)(p->weight + i);
    for (int64_t i = whole; i < p->size; i++) out[i] = x[i] * scale * p->weight[i];
}

void rms_norm_forward(const Norm *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->rows * p->size > 1 << 16)
    for (int64_t row = 0; row < p->rows; row++) normalise(p, row);
}
