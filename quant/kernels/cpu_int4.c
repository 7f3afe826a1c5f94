// y = x W^T + bias for 4-bit W, exactly: codes are multiplied as the integers they are, the scale and the zero point are
// applied once a group, and everything is summed in float32.
//
// The weight ("cpu-int4", made by cpu.py). Outputs come in tiles of 32, in two halves of 16 lanes; inputs in groups,
// padded to `padded`, a multiple of 8:
//     q      uint32 [tile][group][half][padded / 8][lane]   eight codes: input 2s + h in bits 16h + 4s, as code - 8 in
//                                                            two's complement, so that a shift and a table give a pair
//     scale         [tile][group][32]                        float32, or the 16-bit type of the checkpoint
//     zero   uint8  [tile][group][32]                        null: 8
// so y[n] = sum over groups of scale * (sum of x * (code - 8) + (8 - zero) * sum of x).
//
// x is packed first, a block of rows at a time, in the order in which a path below reads it, permuted for act-order.
// `paths` lists what there is code for; the caller picks one that `detect` allows.

#include "native.h"

enum { LANES = 16, TILE = 2 * LANES, ROWS = 8, SLAB = 256, PASS = 128, PASS_BYTES = 1 << 20 };
enum { AHEAD = 512 };  // words to prefetch, where the hardware alone is a third slower

typedef struct {
    const uint32_t *q;
    const void *scale;
    const uint8_t *zero;
    const int32_t *order;
    const void *x, *bias;  // float32 or bfloat16, as y
    void *y;
    int64_t type, scale_type, rows, pieces, outputs, inputs, group, padded;
    // Filled in here:
    int64_t groups, row_limit;
    void *packed;  // x as the path wants it
    float *sums;   // [group][row_limit]: sums of x, for the zero points
} Job;

INLINE const uint32_t *codes(const Job *job, int64_t tile, int64_t group) {
    return job->q + (tile * job->groups + group) * job->padded / 8 * TILE;
}

INLINE void load_scales(const Job *job, int64_t tile, int64_t group, float *scale, float *offset) {
    int64_t at = (tile * job->groups + group) * TILE;
    const uint16_t *half = (const uint16_t *)job->scale + at;
    if (job->scale_type == FLOAT32)
        memcpy(scale, (const float *)job->scale + at, TILE * 4);
    else if (job->scale_type == BFLOAT16)
        for (int i = 0; i < TILE; i++) scale[i] = from_bf16(half[i]);
    else
        for (int i = 0; i < TILE; i++) scale[i] = from_f16(half[i]);
    if (job->zero)
        for (int i = 0; i < TILE; i++) offset[i] = 8 - job->zero[at + i];
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

#define SHIFT_OF(k) (k % 2 * 16 + k / 2 * 4)
#define CODES_OF(words, k, vector) __builtin_convertvector((words << (28 - SHIFT_OF(k))) >> 28, vector)

#define NAME(x) x##_portable
#define TARGET
#define WIDTH 4
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define DECODE(words, step) CODES_OF(words, step, Vector_portable)
#define MULTIPLY(sum, x, codes) sum + x * codes
#include "cpu_int4_rows.h"

#ifdef X86
#define NAME(x) x##_avx2
#define TARGET AVX2
#define WIDTH 8
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define DECODE(words, step) CODES_OF(words, step, Vector_avx2)
#define MULTIPLY(sum, x, codes) sum + x * codes
#include "cpu_int4_rows.h"

static const float float_of_nibble[LANES] ALIGNED = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};

#define NAME(x) x##_avx512
#define TARGET AVX512
#define WIDTH 16
#define Element float
#define CODES 1
#define PACK(values) (values)[0]
#define DECODE(words, step) \
    (Vector_avx512) _mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, SHIFT_OF(step)), _mm512_load_ps(float_of_nibble))
#define MULTIPLY(sum, x, codes) sum + x * codes
#include "cpu_int4_rows.h"

// Twice, since a nibble's neighbour may sit in the fifth bit of the index.
#define BF16_OF_NIBBLE                                                                                \
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, \
        0xc080, 0xc040, 0xc000, 0xbf80
static const uint16_t bf16_of_nibble[32] ALIGNED = {BF16_OF_NIBBLE, BF16_OF_NIBBLE};

AVX512 INLINE __m512i bf16_pairs(__m512i words, const int step) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * step), _mm512_load_si512(bf16_of_nibble));
}

#define NAME(x) x##_bf16
#define TARGET BF16
#define WIDTH 16
#define Element uint32_t
#define CODES 2
#define PACK(values) (as_bits((values)[0]) >> 16 | (as_bits((values)[1]) & 0xffff0000))
#define DECODE(words, step) (__m512bh) bf16_pairs((__m512i)words, step)
#define MULTIPLY(sum, x, codes) _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), codes)
#include "cpu_int4_rows.h"

// AMX multiplies 16 rows x 32 inputs by 32 inputs x 16 outputs; both are 1 KB of bfloat16. float32 x is the exact sum of
// three bfloat16 `pieces` (float16: of two), each multiplied into the same accumulator.
enum { AMX_TILE = LANES * 32 };

AMX static void pack_amx(const Job *job, int64_t block, int64_t group) {
    uint16_t *to = (uint16_t *)job->packed + (block * job->groups + group) * job->padded * LANES * job->pieces;
    for (int r = 0; r < LANES; r++) {
        float sum = 0, values[SLAB];
        for (int64_t at = 0; at < job->padded; at += SLAB) {
            int count = (int)min(SLAB, job->padded - at);
            sum += load_x(job, block * LANES + r, group, at, count, values);
            for (int step = 0; step < count / 32 * job->pieces; step++) {
                uint16_t *tile = to + (at / 32 * job->pieces + step) * AMX_TILE + r * 32;
                float *rest = values + step / job->pieces * 32;
                for (int i = 0; i < 32; i++) {
                    tile[i] = as_bits(rest[i]) >> 16;
                    rest[i] -= from_bf16(tile[i]);
                }
            }
        }
        job->sums[group * job->row_limit + block * LANES + r] = sum;
    }
}

AMX INLINE void configure_amx(int64_t rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = i == 4 || i == 5 ? LANES : (uint8_t)min(LANES, rows);
    }
    _tile_loadconfig(&config);
}

// 32 inputs x 16 outputs of codes.
AMX INLINE void decode_amx(const uint32_t *words, uint16_t *to) {
    for (int i = 0; i < 4; i++, words += LANES) {
        __m512i word = _mm512_loadu_si512(words);
        __builtin_prefetch(words + AHEAD);
        UNROLL for (int step = 0; step < 4; step++, to += 32) _mm512_store_si512(to, bf16_pairs(word, step));
    }
}

// Adds the products of 32 rows, or of 16 if not `two` blocks, and 32 outputs to registers 0 to 3.
AMX INLINE void multiply_amx(const char *x, int64_t block, int64_t pieces, uint16_t (*weight)[SLAB * LANES], int steps,
                             int two) {
    for (int i = 0; i < steps; i++) {
        _tile_loadd(4, weight[0] + i * AMX_TILE, 64);
        _tile_loadd(5, weight[1] + i * AMX_TILE, 64);
        for (int64_t piece = 0; piece < pieces; piece++, x += 2 * AMX_TILE) {
            _tile_loadd(6, x, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(1, 6, 5);
            if (two) {
                _tile_loadd(7, x + block, 64);
                _tile_dpbf16ps(2, 7, 4);
                _tile_dpbf16ps(3, 7, 5);
            }
        }
    }
}

AMX INLINE void store_amx(float (*to)[TILE], int two) {
    _tile_stored(0, to[0], 4 * TILE);
    _tile_stored(1, to[0] + LANES, 4 * TILE);
    if (two) {
        _tile_stored(2, to[LANES], 4 * TILE);
        _tile_stored(3, to[LANES] + LANES, 4 * TILE);
    }
}

// Products of codes leave the registers after every group, to be scaled.
AMX static void run_amx(const Job *job, int64_t tile, int64_t first, int64_t last) {
    configure_amx(last - first);
    float total[PASS][TILE] ALIGNED, product[2 * LANES][TILE] ALIGNED, scale[TILE] ALIGNED, offset[TILE] ALIGNED;
    uint16_t weight[2][SLAB * LANES] ALIGNED;
    memset(total, 0, (last - first) * sizeof *total);
    int64_t input_bytes = LANES * 2 * job->pieces, block_bytes = job->groups * job->padded * input_bytes;
    for (int64_t group = 0; group < job->groups; group++) {
        load_scales(job, tile, group, scale, offset);
        for (int64_t at = 0; at < job->padded; at += SLAB) {
            int steps = (int)min(SLAB, job->padded - at) / 32;
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < steps; i++) {
                    int64_t k = half * job->padded + at + i * 32;
                    decode_amx(codes(job, tile, group) + k / 8 * LANES, weight[half] + i * AMX_TILE);
                }
            for (int64_t row = first; row < last; row += 2 * LANES) {
                int two = row + LANES < last;
                const char *x = (const char *)job->packed + row / LANES * block_bytes;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                multiply_amx(x + (group * job->padded + at) * input_bytes, block_bytes, job->pieces, weight, steps, two);
                store_amx(product, two);
                for (int64_t r = 0; r < min(2 * LANES, last - row); r++) {
                    float sum = at ? 0 : job->sums[group * job->row_limit + row + r];
                    UNROLL for (int n = 0; n < TILE; n += LANES) {
                        Vector_avx512 *to = (Vector_avx512 *)(total[row - first + r] + n);
                        Vector_avx512 from = *(Vector_avx512 *)(product[r] + n);
                        *to += *(Vector_avx512 *)(scale + n) * (from + *(Vector_avx512 *)(offset + n) * sum);
                    }
                }
            }
        }
    }
    _tile_release();
    for (int64_t row = first; row < last; row++) store_y(job, row, tile, total[row - first]);
}
#endif

static const struct {
    void (*pack)(const Job *job, int64_t block, int64_t group);
    void (*run)(const Job *job, int64_t tile, int64_t first, int64_t last);
    void (*dequantize)(const Job *job, int64_t tile, int64_t group);
    int64_t block, bytes;  // rows packed together, and bytes an input (AMX: a piece of an input) is packed to
} paths[] = {
    {pack_portable, run_portable, dequantize_portable, ROWS, 4},
#ifdef X86
    {pack_avx2, run_avx2, dequantize_avx2, ROWS, 4},
    {pack_avx512, run_avx512, dequantize_avx512, ROWS, 4},
    {pack_bf16, run_bf16, dequantize_avx512, ROWS, 2},
    {pack_amx, run_amx, dequantize_avx512, LANES, 2},
#endif
};

// Returns 0, or 1 if there is no memory for x.
int linear(int path, int threads, const Job *given) {
    Job job = *given;
    job.groups = divide_up(job.inputs, job.group);
    job.row_limit = divide_up(job.rows, LANES) * LANES;
    int64_t row_bytes = job.groups * job.padded * job.pieces * paths[path].bytes, bytes = job.row_limit * row_bytes;
    job.packed = aligned_alloc(64, divide_up(bytes + job.row_limit * job.groups * 4, 64) * 64);
    if (!job.packed) return 1;
    job.sums = (float *)((char *)job.packed + bytes);
    // As many rows at a time as stay in a cache while they meet tile after tile.
    int64_t pass = min(PASS, divide_up(PASS_BYTES, row_bytes * TILE) * TILE), passes = divide_up(job.rows, pass);
    int64_t tiles = divide_up(job.outputs, TILE), blocks = divide_up(job.rows, paths[path].block);
#pragma omp parallel for num_threads(threads) if (job.rows > ROWS)
    for (int64_t i = 0; i < blocks * job.groups; i++) paths[path].pack(&job, i / job.groups, i % job.groups);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < passes * tiles; i++)
        paths[path].run(&job, i % tiles, i / tiles * pass, min(job.rows, (i / tiles + 1) * pass));
    free(job.packed);
    return 0;
}

// The dense weight of `outputs`, a multiple of 32, to y [inputs][outputs], in the layer's input order.
void dequantize(int path, int threads, const Job *given) {
    Job job = *given;
    job.groups = divide_up(job.inputs, job.group);
    int64_t tiles = job.outputs / TILE;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < tiles * job.groups; i++) paths[path].dequantize(&job, i % tiles, i / tiles);
}
