// One path of cpu_int4.c: vectors of outputs by single inputs, in the instruction set of the includer's macros.
//     NAME(x) TARGET           suffix and target attribute of every function
//     WIDTH                    outputs in a vector
//     Element CODES            what x is packed as, and how many inputs that is: a float, or a pair of bfloat16
//     PACK(values)             an Element of them
//     DECODE(words, step)      codes step * CODES, ... of every lane, ready to be multiplied
//     MULTIPLY(sum, x, codes)  sum + x * codes

typedef float NAME(Vector) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int16_t NAME(Halves) __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef int32_t NAME(Words) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

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

TARGET INLINE void NAME(multiply)(const Job *job, int64_t tile, int64_t block, const int rows) {
    enum { STEPS = 8 / CODES };
    const int chains = rows < 4 ? 4 / rows : 1;  // independent sums hide each other's latency
    const Element *packed = (const Element *)job->packed + block * ROWS * job->groups * job->padded / CODES;
    float total[ROWS][TILE], scales[TILE], offsets[TILE];
    memset(total, 0, sizeof total);
    for (int64_t group = 0; group < job->groups; group++) {
        const float *sums = job->sums + group * job->row_limit + block * ROWS;
        load_scales(job, tile, group, scales, offsets);
        for (int n = 0; n < TILE; n += WIDTH) {
            const uint32_t *words = codes(job, tile, group) + n / LANES * job->padded / 8 * LANES + n % LANES;
            const Element *x = packed + group * job->padded / CODES * rows;
            NAME(Vector) sum[ROWS][4] = {};
            for (int64_t i = 0; i < job->padded / 8; i++, words += LANES, x += STEPS * rows) {
                NAME(Words) word = *(const NAME(Words) *)words;
                __builtin_prefetch(words + AHEAD);
                UNROLL for (int step = 0; step < STEPS; step++) {
                    __typeof__(DECODE(word, step)) codes = DECODE(word, step);
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
    for (int r = 0; r < rows && block * ROWS + r < job->rows; r++) store_y(job, block * ROWS + r, tile, total[r]);
}

TARGET static void NAME(run)(const Job *job, int64_t tile, int64_t first, int64_t last) {
    for (int64_t block = first / ROWS; block * ROWS < last; block++) switch (block_rows(job, block)) {
        case 1: NAME(multiply)(job, tile, block, 1); break;
        case 2: NAME(multiply)(job, tile, block, 2); break;
        case 4: NAME(multiply)(job, tile, block, 4); break;
        default: NAME(multiply)(job, tile, block, ROWS);
    }
}

#if CODES == 1
// A group of a tile of the dense weight, to y [inputs][outputs] in the layer's input order.
TARGET static void NAME(dequantize)(const Job *job, int64_t tile, int64_t group) {
    float scales[TILE], offsets[TILE];
    load_scales(job, tile, group, scales, offsets);
    // Copies, since what is written here might be the job for all that the compiler knows.
    const uint32_t *words = codes(job, tile, group);
    const int32_t *order = job->order;
    const int64_t half = job->padded / 8 * LANES, outputs = job->outputs, first = group * job->group;
    const int64_t count = min(job->group, job->inputs - first), bf16 = job->type == BFLOAT16;
    char *y = (char *)job->y + tile * TILE * (bf16 ? 2 : 4);
    for (int64_t i = 0; i < count; i += 8, words += LANES)
        UNROLL for (int k = 0; k < min(8, count - i); k++) {
            int64_t to = (order ? order[first + i + k] : first + i + k) * outputs;
            UNROLL for (int n = 0; n < TILE; n += WIDTH) {
                NAME(Words) word = *(NAME(Words) *)(words + n / LANES * half + n % LANES);
                NAME(Vector) value = DECODE(word, k) + *(NAME(Vector) *)(offsets + n);
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
#endif

#undef NAME
#undef TARGET
#undef WIDTH
#undef Element
#undef CODES
#undef PACK
#undef DECODE
#undef MULTIPLY
