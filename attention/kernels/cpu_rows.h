// One path of cpu.c, in the instruction set of the includer's macros.
//     NAME(x) TARGET           suffix and target attribute of every function
//     WIDTH VECTORS            floats in a vector, and how many columns of them are multiplied at a time
//     Element CODES            what is multiplied, and how many numbers that is: a float, or a pair of bfloat16
//     MULTIPLY(sum, a, b)      sum + a * b
//     TRANSPOSE                WIDTH rows of four elements to columns

typedef float NAME(Vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef Element NAME(Element) __attribute__((may_alias));
#if CODES == 1
#define Number float
#define EXACT(value) (value)
#define OWN_TYPE FLOAT32
#else
#define Number uint16_t
#define EXACT(value) (as_bits(value) >> 16)
#define OWN_TYPE BFLOAT16
#endif

#define LOAD_FROM(type) \
    case type: \
        for (int64_t i = 0; i < count; i++) to[i] = EXACT(value_of(from, type, i)); \
        break;

// `count` numbers of any type, and zeros up to `padded`. Pairs of bfloat16 are asked only for what they hold exactly.
TARGET static void NAME(load)(const void *restrict from, int64_t type, int64_t count, int64_t padded,
                              Number *restrict to) {
    switch (type) {
        LOAD_FROM(FLOAT32)
        LOAD_FROM(BFLOAT16)
        LOAD_FROM(FLOAT16)
        LOAD_FROM(INT8)
        LOAD_FROM(FP8_E4M3)
    }
    for (int64_t i = count; i < padded; i++) to[i] = 0;
}

// To scratch->keys; `next` will be asked for soon.
TARGET static void NAME(pack_keys)(const Job *job, Scratch *scratch, const Block *block, const Block *next,
                                   int64_t columns) {
    int64_t dim = job->k.dim, stride = key_stride(job);
    int as_they_lie = job->keys.type == OWN_TYPE && dim == stride;
    for (int64_t key = 0; key < columns; key += WIDTH) {
        const void *rows[WIDTH];
        for (int i = 0; i < WIDTH; i++) {
            Number *row = (Number *)scratch->rows + i * stride;
            if (!as_they_lie) NAME(load)(block->key_at[key + i], job->keys.type, dim, stride, row);
            rows[i] = as_they_lie ? (const void *)block->key_at[key + i] : row;
            prefetch(next->key_at[key + i], dim * job->keys.bytes);
        }
        for (int64_t step = 0; step < stride / CODES; step += 4)
            TRANSPOSE(rows, step, (NAME(Element) *)scratch->keys + step * KEYS + key);
    }
}

// To scratch->values.
TARGET static void NAME(pack_values)(const Job *job, Scratch *scratch, const Block *block, const Block *next,
                                     int64_t count) {
    int64_t dim = job->v.dim, stride = value_stride(job), bytes = dim * job->values.bytes;
    for (int64_t key = 0; key < count; key += CODES) {
        for (int i = 0; i < CODES; i++) prefetch(next->value_at[key + i], bytes);
#if CODES == 1
        NAME(load)(block->value_at[key], job->values.type, dim, stride, (float *)scratch->values + key * stride);
#else
        const uint16_t *even = (const uint16_t *)block->value_at[key], *odd = (const uint16_t *)block->value_at[key + 1];
        uint32_t *restrict pairs = (uint32_t *)scratch->values + key / 2 * stride;
        if (job->values.type != BFLOAT16) {
            uint16_t *rows = (uint16_t *)scratch->rows;
            NAME(load)(even, job->values.type, dim, dim, rows);
            NAME(load)(odd, job->values.type, dim, dim, rows + stride);
            even = rows, odd = rows + stride;
        }
        for (int64_t d = 0; d < dim; d++) pairs[d] = even[d] | (uint32_t)odd[d] << 16;
        for (int64_t d = dim; d < stride; d++) pairs[d] = 0;
#endif
    }
}

TARGET INLINE void NAME(multiply_rows)(const int rows, const int vectors, int64_t steps, const NAME(Element) *a,
                                       int64_t a_stride, const NAME(Element) *b, int64_t b_stride, float *c,
                                       int64_t c_stride, int adding) {
    NAME(Vector) sum[4][VECTORS] = {0}, column[VECTORS];
    if (adding)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int n = 0; n < vectors; n++) sum[r][n] = *(NAME(Vector) *)(c + r * c_stride + n * WIDTH);
    for (int64_t step = 0; step < steps; step++) {
        UNROLL for (int n = 0; n < vectors; n++) column[n] = *(const NAME(Vector) *)(b + step * b_stride + n * WIDTH);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int n = 0; n < vectors; n++)
                sum[r][n] = MULTIPLY(sum[r][n], a[r * a_stride + step], column[n]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < vectors; n++) *(NAME(Vector) *)(c + r * c_stride + n * WIDTH) = sum[r][n];
}

// c [rows][columns] = a [rows][steps] b [steps][columns], or += if `adding`; columns is a multiple of WIDTH.
TARGET static void NAME(multiply)(int64_t rows, int64_t columns, int64_t steps, const void *a, int64_t a_stride,
                                  const void *b, int64_t b_stride, float *c, int64_t c_stride, int adding) {
    for (int64_t n = 0, wide; n < columns; n += wide ? VECTORS * WIDTH : WIDTH) {
        wide = columns - n >= VECTORS * WIDTH;
        for (int64_t r = 0; r < rows; r += 4) {
            const NAME(Element) *rows_of_a = (const NAME(Element) *)a + r * a_stride, *columns_of_b = b;
            float *to = c + r * c_stride + n;
            columns_of_b += n;
#define MULTIPLY_ROWS(rows, vectors) \
    NAME(multiply_rows)(rows, vectors, steps, rows_of_a, a_stride, columns_of_b, b_stride, to, c_stride, adding)
            switch (min(4, rows - r) + (wide ? 4 : 0)) {
                case 1: MULTIPLY_ROWS(1, 1); break;
                case 2: MULTIPLY_ROWS(2, 1); break;
                case 3: MULTIPLY_ROWS(3, 1); break;
                case 4: MULTIPLY_ROWS(4, 1); break;
                case 5: MULTIPLY_ROWS(1, VECTORS); break;
                case 6: MULTIPLY_ROWS(2, VECTORS); break;
                case 7: MULTIPLY_ROWS(3, VECTORS); break;
                default: MULTIPLY_ROWS(4, VECTORS);
            }
        }
    }
}

// Scores of a row become weights: those of the keys from `low` to before `high`, which it sees; the others are 0.
TARGET static void NAME(weigh)(const Job *job, const Block *block, Result result, int64_t row, int low, int high,
                               float *restrict scores, Number *restrict weights) {
    if (low >= high) {
        memset(weights, 0, KEYS * sizeof *weights);
        return;
    }
    for (int n = 0; n < KEYS; n++) scores[n] *= block->key_factor[n];
    float cap = job->softcap;
    if (cap)
        for (int n = 0; n < KEYS; n++) scores[n] = cap * tanh_of(scores[n] / cap);
    float old = result.top[row], top = old, total = 0;
#pragma omp simd reduction(max : top)
    for (int n = 0; n < KEYS; n++) {
        float score = n >= low && n < high ? scores[n] : -__builtin_inff();
        scores[n] = score;
        top = score > top ? score : top;
    }
    for (int n = 0; n < KEYS; n++) scores[n] = exp_of(scores[n] - top);
#pragma omp simd reduction(+ : total)
    for (int n = 0; n < KEYS; n++) total += scores[n];
#if CODES == 1
    for (int n = 0; n < KEYS; n++) weights[n] = scores[n] * block->value_factor[n];
#else
    for (int n = 0; n < KEYS; n += 2 * WIDTH) {
        const NAME(Vector) *from = (NAME(Vector) *)(scores + n), *factor = (NAME(Vector) *)(block->value_factor + n);
        _mm512_storeu_si512(weights + n, (__m512i)_mm512_cvtne2ps_pbh(from[1] * factor[1], from[0] * factor[0]));
    }
#endif
    result.top[row] = top;
    float shrink = exp_of(old - top), *sums = result.sums + row * value_stride(job);
    result.total[row] = result.total[row] * shrink + total;
    if (shrink != 1)
        for (int64_t d = 0; d < value_stride(job); d++) sums[d] *= shrink;
}

// A part of the keys of a tile, to scratch->result.
TARGET static void NAME(attend)(const Job *job, const Tile *tile, int64_t kv_head, int64_t part, int64_t parts,
                                Scratch *scratch) {
    int64_t group = group_of(job), keys = key_stride(job), values = value_stride(job), rows = tile->rows;
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = tile->start + (tile->row + r) / group, head = kv_head * group + (tile->row + r) % group;
        const char *q = (const char *)job->q.data + (token * job->q.token + head * job->q.head) * job->q.bytes;
        NAME(load)(q, job->q.type, job->k.dim, keys, (Number *)scratch->queries + r * keys);
        scratch->result.top[r] = LOWEST;
        scratch->result.total[r] = 0;
    }
    memset(scratch->result.sums, 0, rows * values * 4);
    int64_t blocks = divide_up(tile->stop - tile->first, KEYS);
    int64_t stop = min(tile->stop, tile->first + blocks * (part + 1) / parts * KEYS);
    int64_t key = tile->first + blocks * part / parts * KEYS;
    Block *block = scratch->blocks, *next = block + 1;
    locate(job, tile, kv_head, key, scratch->zeros, block);
    for (; key < stop; key += KEYS) {
        int64_t count = min(KEYS, stop - key), columns = divide_up(count, WIDTH) * WIDTH;
        locate(job, tile, kv_head, key + KEYS, scratch->zeros, next);
        NAME(pack_keys)(job, scratch, block, next, columns);
        NAME(pack_values)(job, scratch, block, next, count);
        for (int64_t r = 0; r < rows; r += BATCH) {
            float scores[BATCH][KEYS] ALIGNED;
            Number weights[BATCH][KEYS] ALIGNED;
            int64_t batch = min(BATCH, rows - r);
            NAME(multiply)(batch, columns, keys / CODES, (Number *)scratch->queries + r * keys, keys / CODES,
                           scratch->keys, KEYS, scores[0], KEYS, 0);
            for (int64_t i = 0; i < batch; i++) {
                int64_t position = tile->position + (tile->row + r + i) / group, from = first_key(job, position);
                int low = (int)max(0, min(KEYS, from - key)), high = (int)min(count, position + 1 - key);
                NAME(weigh)(job, block, scratch->result, r + i, low, high, scores[i], weights[i]);
            }
            NAME(multiply)(batch, values, divide_up(count, CODES), weights[0], KEYS / CODES, scratch->values, values,
                           scratch->result.sums + r * values, values, 1);
        }
        Block *done = block;
        block = next, next = done;
    }
}

#if CODES == 1
// Joins what the parts of a tile came to in the first of them, and writes it out.
TARGET static void NAME(finish)(const Job *job, const Tile *tile, int64_t kv_head, int64_t parts, const Result *results) {
    int64_t group = group_of(job), dim = job->v.dim, stride = value_stride(job);
    for (int64_t r = 0; r < tile->rows; r++) {
        int64_t head = kv_head * group + (tile->row + r) % group, token = tile->start + (tile->row + r) / group;
        float top = job->sinks ? job->sinks[head] : LOWEST;
        for (int64_t i = 0; i < parts; i++) top = results[i].top[r] > top ? results[i].top[r] : top;
        float total = job->sinks ? exp_of(job->sinks[head] - top) : 0;
        float *restrict sums = results->sums + r * stride;
        for (int64_t i = 0; i < parts; i++) {
            float share = exp_of(results[i].top[r] - top), *more = results[i].sums + r * stride;
            total += results[i].total[r] * share;
            if (i)
                for (int64_t d = 0; d < dim; d++) sums[d] += more[d] * share;
            else if (share != 1)
                for (int64_t d = 0; d < dim; d++) sums[d] *= share;
        }
        int64_t at = (token * job->heads + head) * dim;
        if (job->q.type == BFLOAT16)
            for (int64_t d = 0; d < dim; d++) ((uint16_t *)job->out)[at + d] = to_bf16(sums[d] / total);
        else
            for (int64_t d = 0; d < dim; d++) ((float *)job->out)[at + d] = sums[d] / total;
    }
}

// One key or value of every head, as attention.kv_dtypes says.
TARGET static void NAME(keep)(const Rows *rows, const Pages *pages, int64_t token, int64_t slot, int64_t heads) {
    for (int64_t head = 0; head < heads; head++) {
        const char *from = (const char *)rows->data + (token * rows->token + head * rows->head) * rows->bytes;
        int64_t at = slot * heads + head, dim = rows->dim;
        if (!pages->scale) {
            memcpy((char *)pages->data + at * pages->row, from, dim * pages->bytes);
            continue;
        }
        uint32_t bits = 0;  // of the largest magnitude: they are ordered as the numbers are, and NaN is above all
#pragma omp simd reduction(max : bits)
        for (int64_t d = 0; d < dim; d++) {
            float value = rows->type == FLOAT32 ? value_of(from, FLOAT32, d) : value_of(from, BFLOAT16, d);
            uint32_t magnitude = as_bits(value) & 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
        float largest = pages->type == INT8 ? 127 : 448, scale = as_float(bits) / largest;
        if (scale == 0) scale = 1;
        if (pages->fixed) scale = bits < 0x7f800000 ? pages->fixed[head] : as_float(0x7fc00000);
        pages->scale[at] = scale;
        uint8_t *restrict to = (uint8_t *)pages->data + at * pages->row;
        for (int64_t d = 0; d < dim; d++) {
            float value = rows->type == FLOAT32 ? value_of(from, FLOAT32, d) : value_of(from, BFLOAT16, d);
            float code = value / scale;
            code = code > largest ? largest : code < -largest ? -largest : code;
            float whole = (code + 0x1.8p23f) - 0x1.8p23f;
            to[d] = pages->type == FP8_E4M3 ? to_fp8(code) : code != code ? 0 : (uint8_t)(int8_t)whole;
        }
    }
}

TARGET static void NAME(store)(const Job *job, int64_t keeps, int64_t token) {
    NAME(keep)(&job->k, &job->keys, token, job->slots[token], job->kv_heads);
    if (keeps > 1) NAME(keep)(&job->v, &job->values, token, job->slots[token], job->kv_heads);
}
#endif

#undef NAME
#undef TARGET
#undef WIDTH
#undef VECTORS
#undef Element
#undef CODES
#undef MULTIPLY
#undef TRANSPOSE
#undef LOAD_FROM
#undef MULTIPLY_ROWS
#undef Number
#undef EXACT
#undef OWN_TYPE
