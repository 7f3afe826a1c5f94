// Small operators of modelling code: RMS normalisation, gated activation, rotary embedding. One pass over the data each, in float32,
// rounded where the formulas of recognize.py round.
//
// `paths` lists what there is code for; the caller picks one that `detect` allows.

#include <math.h>

#include "native.h"

enum { ROUNDED, LATE, ONE_PLUS };
enum { SILU, GELU_TANH };
enum { THREAD_WORK = 1 << 15 };  // numbers that are worth one more thread

// Strides are in numbers; that of the last dimension is 1.
typedef struct {
    const void *x, *weight;
    void *y;  // [rows][size]
    int64_t type, form, rows, size;
    int64_t inner, outer_stride, inner_stride;  // row r of x is at r / inner and r % inner
    float eps;
} Norm;

typedef struct {
    const void *gate, *up;
    void *y;  // [rows][size]
    int64_t type, activation, rows, size, gate_stride, up_stride;
} Gate;

typedef struct {
    const void *x;
    void *y;  // [tokens][heads][2 half]
    int64_t heads, head_stride, token_stride;
} Heads;

typedef struct {
    Heads q, k;
    const void *cos, *sin;
    int64_t type, tokens, half, cos_stride, sin_stride;
} Rotary;

INLINE float get(const void *from, const int64_t type, int64_t i) {
    switch (type) {
        case FLOAT32: return ((const float *)from)[i];
        case BFLOAT16: return from_bf16(((const uint16_t *)from)[i]);
        default: return from_f16(((const uint16_t *)from)[i]);
    }
}

INLINE void put(void *to, const int64_t type, int64_t i, float value) {
    switch (type) {
        case FLOAT32: ((float *)to)[i] = value; break;
        case BFLOAT16: ((uint16_t *)to)[i] = to_bf16(value); break;
        default: ((uint16_t *)to)[i] = to_f16(value);
    }
}

INLINE float rounded(float value, const int64_t type) {
    switch (type) {
        case FLOAT32: return value;
        case BFLOAT16: return from_bf16(to_bf16(value));
        default: return from_f16(to_f16(value));
    }
}

INLINE const void *at(const void *from, int64_t type, int64_t i) {
    return (const char *)from + i * (type == FLOAT32 ? 4 : 2);
}

// x / (1 + e^-inner). The square of a root of e^-inner is infinite where that is, and not before.
INLINE float times_logistic(float x, float inner) {
    float rest, limited = inner < -90 ? -90 : inner > 90 ? 90 : inner;  // NaN stays NaN
    float power = exponential(-limited / 2, &rest), root = power + power * rest;
    return x / (1 + root * root);
}

// The types are constants of each copy of a row's code.
#define BY_TYPE(type, run)                          \
    switch (type) {                                 \
        case FLOAT32: run(FLOAT32); break;          \
        case BFLOAT16: run(BFLOAT16); break;        \
        default: run(FLOAT16);                      \
    }

#define NAME(x) x##_portable
#define TARGET
#include "cpu_rows.h"

#ifdef X86
#define NAME(x) x##_avx2
#define TARGET AVX2
#include "cpu_rows.h"

#define NAME(x) x##_avx512
#define TARGET AVX512
#include "cpu_rows.h"
#endif

static const struct {
    void (*norm)(const Norm *job, int64_t row);
    void (*gate)(const Gate *job, int64_t row);
    void (*rotary)(const Rotary *job, int64_t token);
} paths[] = {
    {norm_portable, gate_portable, rotary_portable},
#ifdef X86
    {norm_avx2, gate_avx2, rotary_avx2},
    {norm_avx512, gate_avx512, rotary_avx512},
#endif
};

#define EACH(count, numbers, run)                                                         \
    const int64_t threads = min(most_threads, 1 + (count) * (numbers) / THREAD_WORK);     \
    (void)threads; /* without OpenMP */                                                   \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                     \
    for (int64_t i = 0; i < (count); i++) paths[path].run(job, i);                        \
    return 0;

int rms_norm(int path, int most_threads, const Norm *job) { EACH(job->rows, job->size, norm) }

int gated(int path, int most_threads, const Gate *job) { EACH(job->rows, job->size, gate) }

int rotate(int path, int most_threads, const Rotary *job) {
    EACH(job->tokens, (job->q.heads + job->k.heads) * 2 * job->half, rotary)
}
