/* Rotary embedding of one head. */
#pragma once
#include <stdint.h>
#include <string.h>

/* Turn the pairs (i, half + i) of x (size,) by the angles whose cos and sin (half,) are given; the rest passes through. out may be x. */
static inline void rotate_head(const float *x, const float *cos, const float *sin, float *out, int64_t half, int64_t size) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
    if (out != x) memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(float));
}
