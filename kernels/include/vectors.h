/* Vectors of 16 floats for the C kernels (gcc's vector extensions: one AVX-512 register, two of AVX2, four of NEON), and 2^x on them. */
#pragma once
#include <stdint.h>
#ifdef __AVX512F__
#include <immintrin.h>
#define WIDE 1 /* a vector is one register, and its lanes move cheaply; elsewhere gcc moves them one by one */
#else
#define WIDE 0
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf blend(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return blend(a > b, a, b); }

/* 2^x: 2^round(x) times a polynomial of the rest (relative minimax, degree 5). NaN stays NaN. */
INLINE vf exp2v(vf x) {
#ifdef __AVX512F__
    vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - whole;
#else
    x = blend(x < splat(-126.0f), splat(-126.0f), x); /* stays there below, which is as good as 0 */
    x = blend(x > splat(127.0f), splat(127.0f), x);
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, which lies in the low bits */
    vf shifted = x + magic, f = x - (shifted - magic);
#endif
    vf p = splat(1.32647273e-03f);
    p = p * f + splat(9.67151299e-03f);
    p = p * f + splat(5.55073358e-02f);
    p = p * f + splat(2.40222424e-01f);
    p = p * f + splat(6.93147004e-01f);
    p = p * f + splat(1.0f);
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

/* e = exp(-|x|), from which the sigmoid and the softplus of x follow without overflow. */
INLINE vf exp_minus_abs(vf x) { return exp2v(blend(x < splat(0.0f), x, -x) * splat(1.44269504f)); }

INLINE vf sigmoid(vf x) {
    vf e = exp_minus_abs(x);
    return blend(x < splat(0.0f), e, splat(1.0f)) / (splat(1.0f) + e);
}

/* v[i] lane j becomes v[j] lane i. */
INLINE void transpose(vf v[LANES]) {
    const vi eight = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const vi four = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const vi two = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const vi one = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
#define SWAP(apart, lower)                                                  \
    for (int i = 0; i < LANES; i++)                                         \
        if (!(i & apart)) {                                                 \
            const vf a = v[i], b = v[i + apart];                            \
            v[i] = __builtin_shuffle(a, b, lower);                          \
            v[i + apart] = __builtin_shuffle(a, b, lower + apart);          \
        }
    SWAP(8, eight) SWAP(4, four) SWAP(2, two) SWAP(1, one)
#undef SWAP
}

/* `count` floats, the other lanes 0. */
INLINE vf load_part(const float *p, int count) {
    if (count == LANES) return *(const vf_any *)p;
    vf v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}

INLINE void store_part(float *p, vf v, int count) {
    if (count == LANES) *(vf_any *)p = v;
    else for (int i = 0; i < count; i++) p[i] = v[i];
}
