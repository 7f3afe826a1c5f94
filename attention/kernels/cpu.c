// Attention of packed queries over the pages of a KV cache, and the storing of their keys and values before it.
//
// The queries of a sequence that share a key head are rows: row r is query r / group of head r % group. Rows come in tiles
// of up to ROWS, the keys that a tile can see in blocks of KEYS, and a thread takes one tile, one key head and, where that
// leaves threads without work, one of several parts of the keys:
//
//     scores  [rows][KEYS]       queries [rows][key_dim]  times  keys   [key_dim][KEYS]     packed from the pages
//     sums    [rows][value_dim] += weights [rows][KEYS]   times  values [KEYS][value_dim]   packed from the pages
//
// some rows at a time, with the running maximum and total of an online softmax (Milakov and Gimelshein 2018;
// FlashAttention, Dao et al. 2022). A block is packed where the nearest cache holds it and is forgotten; no copy of the KV
// cache is ever made. Decoding is the same with one query.
//
// Every path computes in float32. `bf16` multiplies pairs of bfloat16, which is exact for queries and keys in bfloat16 and
// for codes of 8 bits, whose scales are applied to scores and weights; it rounds the weights of values to bfloat16.
// `paths` lists what there is code for; the caller picks one that `detect` allows.

#include "native.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

enum { ROWS = 64, BATCH = 16, KEYS = 128, BLOCKS_PER_PART = 2 };
enum { THREAD_WORK = 1 << 19 };      // multiplications that are worth one more thread
enum { THREAD_BYTES = 1 << 17 };     // bytes to store that are

#include "cpu_numbers.h"

static const float LOWEST = -0x1p127f;  // below every score, and finite: no key has been seen yet

// One tensor of this forward: [tokens][heads][dim] of `type`; strides in elements, that of dim is 1.
typedef struct {
    const void *data;
    int64_t type, bytes, token, head, dim;
} Rows;

// Keys or values of one pair of the cache: [slots][kv_heads][dim] of `type`, and [slots][kv_heads] if it is quantized.
typedef struct {
    void *data;
    float *scale;
    const float *fixed;  // [kv_heads]: scales that do not depend on what is stored; or null
    int64_t type, bytes;  // of an element
    int64_t row;          // bytes from a vector to the next: values that are a part of the keys lie as far apart as those
} Pages;

typedef struct {
    Rows q, k, v;
    Pages keys, values;
    void *out;           // [tokens][heads][value_dim], as q
    const float *sinks;  // [heads] or null
    const int64_t *slots;
    const int32_t *tables, *starts, *lengths;
    int64_t tokens, sequences, table_width, block_size, heads, kv_heads;
    int64_t window, chunk;  // 0: none
    float scale, softcap;   // 0: none
} Job;

typedef struct {
    int64_t sequence, start, row, rows;  // start: of the sequence's queries
    int64_t position;                    // of its first query
    int64_t first, stop;                 // the keys that any of the rows sees
} Tile;

// What the online softmax of a tile's rows has come to: over all its keys, or a part of them.
typedef struct {
    float *top, *total, *sums;  // [rows], [rows], [rows][value_stride]
} Result;

// A block of keys and values in the pages, and what their products are multiplied by.
typedef struct {
    const char *key_at[KEYS], *value_at[KEYS];
    float key_factor[KEYS], value_factor[KEYS];
} Block;

// What a thread works in.
typedef struct {
    void *queries, *keys, *values, *rows;
    char *zeros;  // in place of keys and values past the last
    Block blocks[2];
    Result result;
} Scratch;

INLINE int64_t group_of(const Job *job) { return job->heads / job->kv_heads; }

INLINE int64_t key_stride(const Job *job) { return divide_up(job->k.dim, 8) * 8; }

INLINE int64_t value_stride(const Job *job) { return divide_up(job->v.dim, 16) * 16; }

INLINE int64_t first_key(const Job *job, int64_t position) {
    int64_t first = job->window ? max(0, position - job->window + 1) : 0;
    return job->chunk ? max(first, position / job->chunk * job->chunk) : first;
}

// Finds up to KEYS keys from `first`; zeros take the place of those that are not there.
static void locate(const Job *job, const Tile *tile, int64_t kv_head, int64_t first, const char *zeros, Block *block) {
    int64_t count = max(0, min(KEYS, tile->stop - first)), size = job->block_size, i = 0;
    const int32_t *table = job->tables + tile->sequence * job->table_width;
    for (int64_t page = first / size, offset = first % size; i < count; page++, offset = 0) {
        int64_t at = (table[page] * size + offset) * job->kv_heads + kv_head;
        for (; i < count && offset < size; i++, offset++, at += job->kv_heads) {
            block->key_at[i] = (const char *)job->keys.data + at * job->keys.row;
            block->value_at[i] = (const char *)job->values.data + at * job->values.row;
            if (job->keys.scale) {
                block->key_factor[i] = job->scale * job->keys.scale[at];
                block->value_factor[i] = job->values.scale[at];
            }
        }
    }
    for (; i < KEYS; i++) {
        block->key_at[i] = block->value_at[i] = zeros;
        block->key_factor[i] = block->value_factor[i] = 0;
    }
    if (!job->keys.scale)
        for (i = 0; i < KEYS; i++) block->key_factor[i] = job->scale, block->value_factor[i] = 1;
}

INLINE void prefetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

#define NAME(x) x##_portable
#define TARGET
#define TRANSPOSE transpose_portable
#define WIDTH 4
#define VECTORS 2
#define Element float
#define CODES 1
#define MULTIPLY(sum, a, b) sum + a * b
#include "cpu_rows.h"

#ifdef X86
#define NAME(x) x##_avx2
#define TARGET AVX2
#define TRANSPOSE transpose_avx2
#define WIDTH 8
#define VECTORS 2
#define Element float
#define CODES 1
#define MULTIPLY(sum, a, b) sum + a * b
#include "cpu_rows.h"

#define NAME(x) x##_avx512
#define TARGET AVX512
#define TRANSPOSE transpose_avx512
#define WIDTH 16
#define VECTORS 4
#define Element float
#define CODES 1
#define MULTIPLY(sum, a, b) sum + a * b
#include "cpu_rows.h"

#define NAME(x) x##_bf16
#define TARGET BF16
#define TRANSPOSE transpose_avx512
#define WIDTH 16
#define VECTORS 4
#define Element uint32_t
#define CODES 2
#define MULTIPLY(sum, a, b) (Vector_bf16) _mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b)
#include "cpu_rows.h"
#endif

static const struct {
    void (*store)(const Job *job, int64_t keeps, int64_t token);
    void (*attend)(const Job *job, const Tile *tile, int64_t kv_head, int64_t part, int64_t parts, Scratch *scratch);
    void (*finish)(const Job *job, const Tile *tile, int64_t kv_head, int64_t parts, const Result *results);
} paths[] = {
    {store_portable, attend_portable, finish_portable},
#ifdef X86
    {store_avx2, attend_avx2, finish_avx2},
    {store_avx512, attend_avx512, finish_avx512},
    {store_avx512, attend_bf16, finish_avx512},
#endif
};

// Cuts every sequence into tiles. Returns how many; with `tiles` null only counts.
static int64_t cut(const Job *job, Tile *tiles) {
    int64_t count = 0, group = group_of(job);
    for (int64_t sequence = 0; sequence < job->sequences; sequence++) {
        int64_t start = job->starts[sequence], queries = job->starts[sequence + 1] - start;
        int64_t position = job->lengths[sequence] - queries;
        for (int64_t row = 0; row < queries * group; row += ROWS, count++) {
            int64_t rows = min(ROWS, queries * group - row), stop = position + (row + rows - 1) / group + 1;
            Tile tile = {sequence, start, row, rows, position, first_key(job, position + row / group), stop};
            if (tiles) tiles[count] = tile;
        }
    }
    return count;
}

// The next `bytes` of memory; of none, if it is only counted.
static void *take(char **memory, int64_t *taken, int64_t bytes) {
    void *here = *memory ? *memory + *taken : NULL;
    *taken += divide_up(bytes, 64) * 64;
    return here;
}

static Result result_in(const Job *job, int64_t rows, char *memory, int64_t *taken) {
    Result result = {.top = take(&memory, taken, rows * 4)};
    result.total = take(&memory, taken, rows * 4);
    result.sums = take(&memory, taken, rows * value_stride(job) * 4);
    return result;
}

static Scratch scratch_in(const Job *job, int64_t rows, char *memory, int64_t *taken) {
    int64_t keys = key_stride(job), values = value_stride(job);
    Scratch scratch = {.queries = take(&memory, taken, rows * keys * 4)};
    scratch.keys = take(&memory, taken, KEYS * keys * 4);
    scratch.values = take(&memory, taken, KEYS * values * 4);
    scratch.rows = take(&memory, taken, 16 * max(keys, values) * 4);
    scratch.zeros = take(&memory, taken, max(keys, values) * 4);
    if (memory) memset(scratch.zeros, 0, max(keys, values) * 4);
    return scratch;
}

static void store(int path, int64_t most_threads, int64_t keeps, const Job *job) {
    int64_t bytes = job->tokens * job->kv_heads * (job->k.dim * job->keys.bytes + job->v.dim * job->values.bytes);
    int64_t threads = min(most_threads, 1 + bytes / THREAD_BYTES);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < job->tokens; token++) paths[path].store(job, keeps, token);
}

// Stores the first `keeps` (0 to 2) of keys and values, then attends. Returns 0, or 1 if there is no memory to work in.
int attend(int path, int64_t most_threads, int keeps, const Job *job) {
    if (keeps) store(path, most_threads, keeps, job);
    int64_t count = cut(job, NULL), items = count * job->kv_heads, work = 0, longest = 0, rows = 0;
    Tile *tiles = malloc((count + 1) * sizeof *tiles);
    if (!tiles) return 1;
    cut(job, tiles);
    for (const Tile *tile = tiles; tile < tiles + count; tile++) {
        int64_t keys = tile->stop - tile->first;
        work += (tile->rows + 8) * keys * (job->k.dim + job->v.dim) * job->kv_heads;
        longest = max(longest, keys);
        rows = max(rows, tile->rows);
    }
    int64_t threads = min(most_threads, 1 + work / THREAD_WORK), parts = 1;
    if (threads > 1 && items < 2 * threads && items)
        parts = max(1, min(divide_up(2 * threads, items), longest / (KEYS * BLOCKS_PER_PART)));

    int64_t scratch_bytes = 0, result_bytes = 0, kept = parts > 1 ? items * parts : threads;
    scratch_in(job, rows, NULL, &scratch_bytes);
    result_in(job, rows, NULL, &result_bytes);
    char *memory = aligned_alloc(64, scratch_bytes * threads + result_bytes * kept);
    Result *results = malloc(kept * sizeof *results);
    if (memory && results) {
        for (int64_t i = 0, at = scratch_bytes * threads; i < kept; i++) results[i] = result_in(job, rows, memory, &at);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            int64_t thread = omp_get_thread_num(), at = scratch_bytes * thread;
            Scratch scratch = scratch_in(job, rows, memory, &at);
#pragma omp for schedule(dynamic)
            for (int64_t i = items * parts - 1; i >= 0; i--) {  // from the end, where sequences see the most keys
                int64_t item = i / parts, head = item % job->kv_heads;
                scratch.result = results[parts > 1 ? i : thread];
                paths[path].attend(job, tiles + item / job->kv_heads, head, i % parts, parts, &scratch);
                if (parts == 1) paths[path].finish(job, tiles + item / job->kv_heads, head, 1, &scratch.result);
            }
            if (parts > 1) {
#pragma omp for
                for (int64_t i = 0; i < items; i++)
                    paths[path].finish(job, tiles + i / job->kv_heads, i % job->kv_heads, parts, results + i * parts);
            }
        }
    }
    int failed = !memory || !results;
    free(memory);
    free(results);
    free(tiles);
    return failed;
}
