/* Rotary embedding in float32 on a CPU; called by cpu.py, which holds the contract. */
#include "rotate.h"

typedef struct {
    const float *x, *cos, *sin; /* (B, H, T, K), numbers of a head next to each other; (B or 1, T, R/2) contiguous */
    float *out;                 /* (B, H, T, K) contiguous */
    int64_t x_row, x_head, x_step, table_row; /* strides in elements; table_row is 0 for one table of all rows */
    int64_t batch, heads, length, size, half;
    int32_t threads;
} Rope;

static void rotate(const Rope *p, int64_t row, int64_t head) {
    for (int64_t t = 0; t < p->length; t++) {
        const int64_t angles = row * p->table_row + t * p->half;
        const float *x = p->x + row * p->x_row + head * p->x_head + t * p->x_step;
        rotate_head(x, p->cos + angles, p->sin + angles, p->out + ((row * p->heads + head) * p->length + t) * p->size, p->half, p->size);
    }
}

void rope_forward(const Rope *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->batch * p->heads * p->length * p->size > 1 << 16)
    for (int64_t item = 0; item < p->batch * p->heads; item++) rotate(p, item / p->heads, item % p->heads);
}
