// y = x W^T + bias for W of 4- and 8-bit codes, exactly: codes are multiplied as the numbers that they mean, scale and zero
// point are applied once a group, and everything is summed in float32.
//
// The weight ("cpu-codes", made by cpu.py). Outputs come in tiles of 32, in two halves of 16 lanes; inputs in groups,
// padded to `padded`, a multiple of 8:
//     q      uint32 [tile][group][half][padded / n][lane]    n codes of 32 / n bits: input 2s + h in bits 16h + 32s / n, so
//                                                             that a shift gives a pair. Integers are in two's
//                                                             complement, 8 or 128 below the code of the checkpoint
//     scale         [tile][group][32]                         as the checkpoint stores it
//     zero   uint8  [tile][group][32]                         null: 8 or 128
//     table  float  [16]                                      what codes of 4 bits mean
// so y[n] = sum over groups of scale * factor * (sum of x * value + (8 or 128 - zero) * sum of x).
//
// x is packed first, a block of rows at a time, in the order in which a path below reads it, permuted for act-order.
// `paths` lists what there is code for; the caller picks one that `detect` allows.

#include "native.h"

enum { LANES = 16, TILE = 2 * LANES, ROWS = 8, SLAB = 256, PASS = 128, PASS_BYTES = 1 << 20 };
enum { AHEAD = 512 };  // words to prefetch, where the hardware alone is a third slower

enum { NIBBLE_INTEGERS, NIBBLE_TABLE, BYTE_INTEGERS, BYTE_FLOATS };  // floats are e4m3

typedef struct {
    const uint32_t *q;
    const void *scale;
    const uint8_t *zero;
    const int32_t *order;
    const float *table;
    const void *x, *bias;  // float32 or bfloat16, as y
    void *y;
    int64_t kind, type, scale_type, rows, pieces, outputs, inputs, group, padded;
    double factor;
    // Where x is quantized: its type, the type to do it in, inputs that share a step; the step if it is fixed, else 0.
    int64_t input_type, code_type, input_group;
    double input_scale;
    // Filled in here:
    int64_t groups, row_limit;
    void *packed;  // x as the path wants it
    float *sums;   // [group][row_limit]: sums of x, for the zero points; of its codes, as int32, where it is quantized
    float *steps;  // [group][row_limit], and
    int8_t *codes; // [row][inputs], where it is
    uint16_t pairs[32];  // the table in bfloat16, twice, since a nibble's neighbour may sit in the fifth bit of an index
} Job;

INLINE int per_word(const int kind) { return kind < BYTE_INTEGERS ? 8 : 4; }

INLINE int shift_of(const int kind, const int k) { return k % 2 * 16 + k / 2 * (32 / per_word(kind)); }

INLINE const uint32_t *codes(const Job *job, const int kind, int64_t tile, int64_t group) {
    return job->q + (tile * job->groups + group) * job->padded / per_word(kind) * TILE;
}

INLINE void load_scales(const Job *job, int64_t tile, int64_t group, float *scale, float *offset) {
    int64_t at = (tile * job->groups + group) * TILE;
    const uint16_t *half = (const uint16_t *)job->scale + at;
    const uint8_t *byte = (const uint8_t *)job->scale + at;
    const float factor = (float)job->factor;
    switch (job->scale_type) {
        case FLOAT32: memcpy(scale, (const float *)job->scale + at, TILE * 4); break;
        case BFLOAT16: for (int i = 0; i < TILE; i++) scale[i] = from_bf16(half[i]); break;
        case FLOAT16: for (int i = 0; i < TILE; i++) scale[i] = from_f16(half[i]); break;
        case E4M3: for (int i = 0; i < TILE; i++) scale[i] = from_e4m3(byte[i]); break;
        default: for (int i = 0; i < TILE; i++) scale[i] = from_e8m0(byte[i]);
    }
    for (int i = 0; i < TILE; i++) scale[i] *= factor;
    if (job->zero)
        for (int i = 0; i < TILE; i++) offset[i] = (job->kind == NIBBLE_INTEGERS ? 8 : 128) - job->zero[at + i];
    else
        memset(offset, 0, TILE * 4);
}

// `count` values of a row of x from position `at` of a group, zeros where there is padding. Returns their sum.
INLINE float load_x(const Job *job, int64_t row, int64_t group, int64_t at, int count, float *values) {
    int64_t first = group * job->group + at;
    int64_t present = row < job->rows ? min(count, min(job->group - at, job->inputs - first)) : 0;
    const float *full = (const float *)job->x + row * job->inputs;
    const uint16_t *half = (const uint16_t *)job->x + row * job->inputs;
    if (present < count) memset(values, 0, count * 4);
    if (job->order)
        for (int i = 0; i < present; i++) {
            int32_t k = job->order[first + i];
            values[i] = job->type == BFLOAT16 ? from_bf16(half[k]) : full[k];
        }
    else if (job->type == BFLOAT16)
        for (int i = 0; i < present; i++) values[i] = from_bf16(half[first + i]);
    else
        for (int i = 0; i < present; i++) values[i] = full[first + i];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) sum += values[i];
    return sum;
}

INLINE void store_outputs(const Job *job, int64_t at, int64_t first, const float *values, const int count) {
    float bias[TILE] = {0};
    if (job->type == BFLOAT16) {
        if (job->bias)
            for (int i = 0; i < count; i++) bias[i] = from_bf16(((const uint16_t *)job->bias)[first + i]);
        uint16_t *y = (uint16_t *)job->y + at;
        for (int i = 0; i < count; i++) y[i] = to_bf16(values[i] + bias[i]);
    } else {
        if (job->bias) memcpy(bias, (const float *)job->bias + first, count * 4);
        float *y = (float *)job->y + at;
        for (int i = 0; i < count; i++) y[i] = values[i] + bias[i];
    }
}

INLINE void store_y(const Job *job, int64_t row, int64_t tile, const float *values) {
    int64_t first = tile * TILE, at = row * job->outputs + first;
    if (job->outputs - first >= TILE)
        store_outputs(job, at, first, values, TILE);
    else
        store_outputs(job, at, first, values, (int)(job->outputs - first));
}

// The rows that are packed and multiplied together, rounded up to a number there is code for.
INLINE int block_rows(const Job *job, int64_t block) {
    int64_t left = job->rows - block * ROWS;
    return left > 4 ? ROWS : left > 2 ? 4 : (int)left;
}

#define VECTORS(path, width)                                                                        \
    typedef float Vector_##path __attribute__((vector_size(4 * width), aligned(4), may_alias));     \
    typedef int16_t Halves_##path __attribute__((vector_size(2 * width), aligned(2), may_alias));   \
    typedef int32_t Words_##path __attribute__((vector_size(4 * width), aligned(4), may_alias));

VECTORS(portable, 4)

#define NAME(x) x##_portable
#define TARGET
#define WIDTH 4
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define MULTIPLY(sum, x, codes) sum + x * codes

INLINE Vector_portable lookup_portable(const float *table, Words_portable index) {
    Vector_portable found;
    for (int i = 0; i < WIDTH; i++) found[i] = table[index[i] & 15];
    return found;
}
#include "cpu_linear_rows.h"

#ifdef X86
VECTORS(avx2, 8)

AVX2 INLINE Vector_avx2 lookup_avx2(const float *table, Words_avx2 index) {
    __m256i i = (__m256i)index;
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return (Vector_avx2)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

#define NAME(x) x##_avx2
#define TARGET AVX2
#define WIDTH 8
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define MULTIPLY(sum, x, codes) sum + x * codes
#include "cpu_linear_rows.h"

VECTORS(avx512, 16)

AVX512 INLINE Vector_avx512 lookup_avx512(const float *table, Words_avx512 index) {
    return (Vector_avx512)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

#define NAME(x) x##_avx512
#define TARGET AVX512
#define WIDTH 16
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define MULTIPLY(sum, x, codes) sum + x * codes
#include "cpu_linear_rows.h"

// Pairs of bfloat16 of every lane: inputs 2 * step and 2 * step + 1 of a word.
AVX512 INLINE __m512i bf16_pairs(const Job *job, __m512i word, const int kind, const int step) {
    if (kind <= NIBBLE_TABLE)
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * step), _mm512_loadu_si512(job->pairs));
    if (kind == BYTE_INTEGERS) {
        __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 8 * step), 24);
        __m512i odd = _mm512_srai_epi32(_mm512_slli_epi32(word, 8 - 8 * step), 24);
        even = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16);
        return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
    }
    // e4m3: sign, exponent and mantissa move to where bfloat16 has them; what is subnormal there is not here.
    const __m512i subnormal = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i high = step ? word : _mm512_slli_epi16(word, 8);
    __m512i bits = _mm512_and_si512(_mm512_srai_epi16(high, 4), _mm512_set1_epi16((short)0x87f0));
    __m512i value = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_testn_epi16_mask(high, _mm512_set1_epi16(0x7800));
    value = _mm512_mask_permutexvar_epi16(value, small, _mm512_srli_epi16(bits, 4), subnormal);
    return _mm512_or_si512(value, _mm512_and_si512(bits, _mm512_set1_epi16((short)0x8000)));
}

VECTORS(bf16, 16)
#define NAME(x) x##_bf16
#define TARGET BF16
#define WIDTH 16
#define Element uint32_t
#define CODES 2
#define PACK(values) (as_bits((values)[0]) >> 16 | (as_bits((values)[1]) & 0xffff0000))
#define DECODE(job, word, kind, step) (__m512bh) bf16_pairs(job, (__m512i)word, kind, step)
#define MULTIPLY(sum, x, codes) _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), codes)
#include "cpu_linear_rows.h"

#include "cpu_linear_amx.h"
#include "cpu_linear_vnni.h"
#endif

static const struct {
    void (*pack)(const Job *job, int64_t block, int64_t group);
    void (*run)(const Job *job, int64_t tile, int64_t first, int64_t last);
    void (*dequantize)(const Job *job, int64_t tile, int64_t group);
    int64_t block, bytes;  // rows packed together, and bytes an input (AMX: a piece of an input) is packed to
    void (*quantize)(const Job *job, int64_t row);
} paths[] = {
    {pack_portable, run_portable, dequantize_portable, ROWS, 4},
#ifdef X86
    {pack_avx2, run_avx2, dequantize_avx2, ROWS, 4},
    {pack_avx512, run_avx512, dequantize_avx512, ROWS, 4},
    {pack_bf16, run_bf16, dequantize_avx512, ROWS, 2},
    {pack_amx, run_amx, dequantize_avx512, LANES, 2},
    {pack_vnni, run_vnni, dequantize_avx512, ROWS, 1, quantize_vnni},
#endif
};

// x as the path wants it, by all threads that are here.
static void arrange(const Job *job, int path) {
    const int64_t blocks = divide_up(job->rows, paths[path].block);
    if (paths[path].quantize) {
#pragma omp for
        for (int64_t row = 0; row < job->rows; row++) paths[path].quantize(job, row);
    }
#pragma omp for
    for (int64_t i = 0; i < blocks * job->groups; i++) paths[path].pack(job, i / job->groups, i % job->groups);
}

// Returns 0, or 1 if there is no memory for x.
int linear(int path, int threads, const Job *given) {
    Job job = *given;
    job.groups = divide_up(job.inputs, job.group);
    job.row_limit = divide_up(job.rows, LANES) * LANES;
    int64_t row_bytes = job.groups * job.padded * job.pieces * paths[path].bytes, bytes = job.row_limit * row_bytes;
    int64_t by_group = job.row_limit * job.groups, codes = paths[path].quantize ? job.rows * job.inputs : 0;
    job.packed = aligned_alloc(64, divide_up(bytes + by_group * 8 + codes, 64) * 64);
    if (!job.packed) return 1;
    job.sums = (float *)((char *)job.packed + bytes);
    job.steps = job.sums + by_group;
    job.codes = (int8_t *)(job.steps + by_group);
    for (int i = 0; i < 32; i++) job.pairs[i] = to_bf16(job.table[i % 16]);
    // As many rows at a time as stay in a cache while they meet tile after tile.
    int64_t pass = min(PASS, divide_up(PASS_BYTES, row_bytes * TILE) * TILE), passes = divide_up(job.rows, pass);
    int64_t tiles = divide_up(job.outputs, TILE);
    if (job.rows > ROWS) {
#pragma omp parallel num_threads(threads)
        arrange(&job, path);
    } else
        arrange(&job, path);  // takes less than to wake others, and even than to open a region of one
    // Tile after tile as far as possible: reading on where one stopped is a tenth to a half faster, with one row.
#pragma omp parallel for num_threads(threads) schedule(guided)
    for (int64_t i = 0; i < passes * tiles; i++)
        paths[path].run(&job, i % tiles, i / tiles * pass, min(job.rows, (i / tiles + 1) * pass));
    free(job.packed);
    return 0;
}

// Whether there is the path behind AMX, for inputs that are quantized.
int detect_vnni(void) {
#ifdef X86
    return detect() >= 2 && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

// The dense weight of `outputs`, a multiple of 32, to y [inputs][outputs], in the layer's input order.
int dequantize(int path, int threads, const Job *given) {
    Job job = *given;
    job.groups = divide_up(job.inputs, job.group);
    int64_t tiles = job.outputs / TILE;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < tiles * job.groups; i++) paths[path].dequantize(&job, i / job.groups, i % job.groups);
    return 0;
}
