/* Rotary embedding in float32 on a CPU; called by cpu.py, which holds the contract. */
#include <stdint.h>
#include <string.h>

typedef struct {
    const float *x, *cos, *sin; /* (B, H, T, K), numbers of a head next to each other; (B or 1, T, R/2) contiguous */
    float *out;                 /* (B, H, T, K) contiguous */
    int64_t x_row, x_head, x_step, table_row; /* strides in elements; table_row is 0 for one table of all rows */
    int64_t batch, heads, length, size, half;
    int32_t threads;
} Rope;

static void rotate(const Rope *p, int64_t row, int64_t head) {
    const int64_t half = p->half;
    for (int64_t t = 0; t < p->length; t++) {
        const float *restrict x = p->x + row * p->x_row + head * p->x_head + t * p->x_step;
        const float *restrict c = p->cos + row * p->table_row + t * half, *restrict s = p->sin + row * p->table_row + t * half;
        float *restrict out = p->out + ((row * p->heads + head) * p->length + t) * p->size;
        for (int64_t i = 0; i < half; i++) {
            out[i] = x[i] * c[i] - x[half + i] * s[i];
            out[half + i] = x[half + i] * c[i] + x[i] * s[i];
        }
        memcpy(out + 2 * half, x + 2 * half, (p->size - 2 * half) * sizeof(float));
    }
}

void rope_forward(const Rope *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->batch * p->heads * p->length * p->size > 1 << 16)
    for (int64_t item = 0; item < p->batch * p->heads; item++) rotate(p, item / p->heads, item % p->heads);
}
