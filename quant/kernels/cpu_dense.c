// y = x W^T + bias for a dense bfloat16 W [outputs][inputs] as it is stored, and few rows of bfloat16 x: what is read of memory is
// the weight, once, in its order. Summed in float32 and rounded once.
//
// x is packed first, its rows filled up with zeros to whole vectors, in the order in which a path below reads it. `paths` lists
// what there is code for; the caller picks one that `detect` allows.

#include "native.h"

enum { STRIP = 4, CHUNK = 8 * STRIP };  // outputs that are computed together; that a thread takes at a time
// The next strip is fetched meanwhile: the hardware alone follows a row to its end, and reads two thirds as fast.

typedef struct {
    const uint16_t *x, *w, *bias;
    uint16_t *y;
    int64_t rows, outputs, inputs;
    // Filled in here:
    void *packed;
    int64_t row_bytes;  // of packed
} Job;

#define VECTORS(path, width)                                                                   \
    typedef float Vector_##path __attribute__((vector_size(4 * width), aligned(4), may_alias)); \
    typedef int32_t Words_##path __attribute__((vector_size(4 * width), aligned(2), may_alias));

// Two inputs a lane: x as the evens of a vector of words and then its odds, in float32.
#define PACK_FLOATS(to, from, width)                                  \
    for (int i = 0; i < 2 * width; i++)                               \
        ((float *)(to))[i % 2 * width + i / 2] = from_bf16((from)[i]);

VECTORS(portable, 4)
#define NAME(x) x##_portable
#define TARGET
#define WIDTH 4
#define MOST 2
#define X_BYTES 4
#include "cpu_dense_rows.h"

#ifdef X86
VECTORS(avx2, 8)
#define NAME(x) x##_avx2
#define TARGET AVX2
#define WIDTH 8
#define MOST 2
#define X_BYTES 4
#include "cpu_dense_rows.h"

VECTORS(avx512, 16)
#define NAME(x) x##_avx512
#define TARGET AVX512
#define WIDTH 16
#define MOST 4
#define X_BYTES 4
#include "cpu_dense_rows.h"

VECTORS(bf16, 16)
#define NAME(x) x##_bf16
#define TARGET BF16
#define WIDTH 16
#define MOST 6
#define X_BYTES 2
#include "cpu_dense_rows.h"
#endif

static const struct {
    void (*pack)(const Job *job, int64_t row);
    void (*run)(const Job *job, int64_t first, int64_t last);
    int64_t width, bytes;  // inputs in a vector, and bytes of one in packed x
} paths[] = {
    {pack_portable, run_portable, 8, 4},
#ifdef X86
    {pack_avx2, run_avx2, 16, 4},
    {pack_avx512, run_avx512, 32, 4},
    {pack_bf16, run_bf16, 32, 2},
    {pack_bf16, run_bf16, 32, 2},
#endif
};

// Returns 0, or 1 if there is no memory for x.
int dense(int path, int threads, const Job *given) {
    Job job = *given;
    job.row_bytes = divide_up(job.inputs, paths[path].width) * paths[path].width * paths[path].bytes;
    job.packed = aligned_alloc(64, divide_up(max(1, job.rows * job.row_bytes), 64) * 64);
    if (!job.packed) return 1;
    for (int64_t row = 0; row < job.rows; row++) paths[path].pack(&job, row);
    // As in cpu_linear.c: who reads on where it stopped is a fifth faster.
#pragma omp parallel for num_threads(threads) schedule(guided)
    for (int64_t first = 0; first < job.outputs; first += CHUNK)
        paths[path].run(&job, first, min(first + CHUNK, job.outputs));
    free(job.packed);
    return 0;
}
