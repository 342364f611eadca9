/* RMS normalisation of one row. */
#pragma once
#include <math.h>
#include "vectors.h"

/* out = x / sqrt(mean(x^2) + eps) * weight, all (size,); with a residual, x is its sum with x, which is kept in `total`. */
static inline void normalise(const float *x, const float *residual, float *total, const float *weight, float *out, int64_t size,
                             float eps) {
    const int64_t whole = size / LANES * LANES;
    float square = 0.0f;
    vf squares = {0};
    if (residual) {
        for (int64_t i = 0; i < whole; i += LANES) *(vf_any *)(total + i) = *(const vf_any *)(residual + i) + *(const vf_any *)(x + i);
        for (int64_t i = whole; i < size; i++) total[i] = residual[i] + x[i];
        x = total;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        vf value = *(const vf_any *)(x + i);
        squares += value * value;
    }
    for (int64_t i = whole; i < size; i++) square += x[i] * x[i];
    for (int i = 0; i < LANES; i++) square += squares[i];
    const float scale = 1.0f / sqrtf(square / (float)size + eps);
    for (int64_t i = 0; i < whole; i += LANES) *(vf_any *)(out + i) = *(const vf_any *)(x + i) * scale * *(const vf_any *)(weight + i);
    for (int64_t i = whole; i < size; i++) out[i] = x[i] * scale * weight[i];
}
