// One path of cpu_linear.c: vectors of outputs by single inputs, in the instruction set of the includer's macros.
//     NAME(x) TARGET           suffix and target attribute of every function
//     WIDTH                    outputs in a vector
//     Element CODES            what x is packed as, and how many inputs that is: a float, or a pair of bfloat16
//     PACK(values)             an Element of them
//     MULTIPLY(sum, x, codes)  sum + x * codes
//     DECODE(job, word, kind, step)   pairs of bfloat16: what codes 2 * step and 2 * step + 1 of every lane mean.
//                              Floats are decoded here, with the includer's NAME(lookup)(table, index)

#if CODES == 1
#define DECODE NAME(decode)
// What code k of every lane means. A table costs less than a conversion where it fits into a vector.
TARGET INLINE NAME(Vector) NAME(decode)(const Job *job, NAME(Words) word, const int kind, const int k) {
    const int shift = shift_of(kind, k);
    if (kind == NIBBLE_INTEGERS && WIDTH < LANES)
        return __builtin_convertvector((word << (28 - shift)) >> 28, NAME(Vector));
    if (kind <= NIBBLE_TABLE) return NAME(lookup)(job->table, word >> shift);
    NAME(Words) bits = word << (24 - shift);
    if (kind == BYTE_INTEGERS) return __builtin_convertvector(bits >> 24, NAME(Vector));
    NAME(Words) magnitude = (bits & 0x7f000000) >> 4;
    NAME(Vector) value = (NAME(Vector))(magnitude + (120 << 23));
    value += (NAME(Vector))((NAME(Words))(value - 0x1p-6f) & (magnitude < 1 << 23));  // subnormals: no leading 1
    return (NAME(Vector))((NAME(Words))value | (bits & INT32_MIN));
}
#endif

// Once a path rather than once a kind and number of rows: the library is built while somebody waits.
TARGET static NOINLINE void NAME(load)(const Job *job, int64_t tile, int64_t group, float *scales, float *offsets) {
    load_scales(job, tile, group, scales, offsets);
}

TARGET static NOINLINE void NAME(store)(const Job *job, int64_t row, int64_t tile, const float *values) {
    store_y(job, row, tile, values);
}

TARGET static void NAME(pack)(const Job *job, int64_t block, int64_t group) {
    int rows = block_rows(job, block);
    Element *to = (Element *)job->packed + (block * ROWS * job->groups + group * rows) * job->padded / CODES;
    for (int r = 0; r < rows; r++) {
        float sum = 0, values[SLAB];
        for (int64_t at = 0; at < job->padded; at += SLAB) {
            int count = (int)min(SLAB, job->padded - at);
            sum += load_x(job, block * ROWS + r, group, at, count, values);
            for (int i = 0; i < count; i += CODES) to[(at + i) / CODES * rows + r] = PACK(values + i);
        }
        job->sums[group * job->row_limit + block * ROWS + r] = sum;
    }
}

TARGET INLINE void NAME(multiply)(const Job *job, int64_t tile, int64_t block, const int kind, const int rows) {
    const int steps = per_word(kind) / CODES;
    const int chains = rows < 4 ? 4 / rows : 1;  // independent sums hide each other's latency
    const Element *packed = (const Element *)job->packed + block * ROWS * job->groups * job->padded / CODES;
    float total[ROWS][TILE], scales[TILE], offsets[TILE];
    memset(total, 0, sizeof total);
    for (int64_t group = 0; group < job->groups; group++) {
        const float *sums = job->sums + group * job->row_limit + block * ROWS;
        NAME(load)(job, tile, group, scales, offsets);
        for (int n = 0; n < TILE; n += WIDTH) {
            const int64_t count = job->padded / per_word(kind);
            const uint32_t *words = codes(job, kind, tile, group) + n / LANES * count * LANES + n % LANES;
            const Element *x = packed + group * job->padded / CODES * rows;
            NAME(Vector) sum[ROWS][4] = {};
            for (int64_t i = 0; i < count; i++, words += LANES, x += steps * rows) {
                NAME(Words) word = *(const NAME(Words) *)words;
                __builtin_prefetch(words + AHEAD);
                UNROLL for (int step = 0; step < steps; step++) {
                    __typeof__(DECODE(job, word, kind, step)) codes = DECODE(job, word, kind, step);
                    UNROLL for (int r = 0; r < rows; r++)
                        sum[r][step % chains] = MULTIPLY(sum[r][step % chains], x[step * rows + r], codes);
                }
            }
            NAME(Vector) scale = *(NAME(Vector) *)(scales + n), offset = *(NAME(Vector) *)(offsets + n);
            UNROLL for (int r = 0; r < rows; r++) {
                UNROLL for (int chain = 1; chain < chains; chain++) sum[r][0] += sum[r][chain];
                *(NAME(Vector) *)(total[r] + n) += scale * (sum[r][0] + offset * sums[r]);
            }
        }
    }
    for (int r = 0; r < rows && block * ROWS + r < job->rows; r++) NAME(store)(job, block * ROWS + r, tile, total[r]);
}

TARGET INLINE void NAME(run_kind)(const Job *job, int64_t tile, int64_t first, int64_t last, const int kind) {
    for (int64_t block = first / ROWS; block * ROWS < last; block++) switch (block_rows(job, block)) {
        case 1: NAME(multiply)(job, tile, block, kind, 1); break;
        case 2: NAME(multiply)(job, tile, block, kind, 2); break;
        case 4: NAME(multiply)(job, tile, block, kind, 4); break;
        default: NAME(multiply)(job, tile, block, kind, ROWS);
    }
}

#define FOR_KIND(call, ...)                                                       \
    switch (job->kind) {                                                          \
        case BYTE_INTEGERS: call(__VA_ARGS__, BYTE_INTEGERS); break;              \
        case BYTE_FLOATS: call(__VA_ARGS__, BYTE_FLOATS); break;                  \
        case NIBBLE_INTEGERS:                                                     \
            if (WIDTH < LANES) {                                                  \
                call(__VA_ARGS__, NIBBLE_INTEGERS);                               \
                break;                                                            \
            } /* fall through */                                                  \
        default: call(__VA_ARGS__, NIBBLE_TABLE);                                 \
    }

TARGET static void NAME(run)(const Job *job, int64_t tile, int64_t first, int64_t last) {
    FOR_KIND(NAME(run_kind), job, tile, first, last)
}

#if CODES == 1
// A group of a tile of the dense weight, to y [inputs][outputs] in the layer's input order.
TARGET INLINE void NAME(dequantize_kind)(const Job *job, int64_t tile, int64_t group, const int kind) {
    float scales[TILE], offsets[TILE], table[16];
    NAME(load)(job, tile, group, scales, offsets);
    // Copies, since what is written here might be the job for all that the compiler knows.
    memcpy(table, job->table, sizeof table);
    const Job copy = {.table = table};
    const uint32_t *words = codes(job, kind, tile, group);
    const int32_t *order = job->order;
    const int64_t half = job->padded / per_word(kind) * LANES, outputs = job->outputs, first = group * job->group;
    const int64_t count = min(job->group, job->inputs - first), bf16 = job->type == BFLOAT16;
    char *y = (char *)job->y + tile * TILE * (bf16 ? 2 : 4);
    for (int64_t i = 0; i < count; i += per_word(kind), words += LANES)
        UNROLL for (int k = 0; k < min(per_word(kind), count - i); k++) {
            int64_t to = (order ? order[first + i + k] : first + i + k) * outputs;
            UNROLL for (int n = 0; n < TILE; n += WIDTH) {
                NAME(Words) word = *(NAME(Words) *)(words + n / LANES * half + n % LANES);
                NAME(Vector) value = DECODE(&copy, word, kind, k) + *(NAME(Vector) *)(offsets + n);
                value *= *(NAME(Vector) *)(scales + n);
                if (bf16) {
                    NAME(Words) bits = (NAME(Words))value;
                    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
                    *(NAME(Halves) *)((uint16_t *)y + to + n) = __builtin_convertvector(bits, NAME(Halves));
                } else
                    *(NAME(Vector) *)((float *)y + to + n) = value;
            }
        }
}

TARGET static void NAME(dequantize)(const Job *job, int64_t tile, int64_t group) {
    FOR_KIND(NAME(dequantize_kind), job, tile, group)
}
#endif

#undef NAME
#undef TARGET
#undef WIDTH
#undef Element
#undef CODES
#undef PACK
#undef DECODE
#undef MULTIPLY
#undef FOR_KIND
