// One path of cpu_dense.c, in the instruction set of the includer's macros.
//     NAME(x) TARGET    suffix and target attribute of every function
//     WIDTH             words of two inputs in a vector
//     MOST              rows that are multiplied together
//     X_BYTES           of an input in packed x: 2, and pairs are multiplied as bfloat16, or 4, and they are split

TARGET static void NAME(pack)(const Job *job, int64_t row) {
    const uint16_t *x = job->x + row * job->inputs;
    char *to = (char *)job->packed + row * job->row_bytes;
    for (int64_t at = 0; at < job->inputs; at += 2 * WIDTH, to += 2 * WIDTH * X_BYTES) {
        uint16_t part[2 * WIDTH] = {0};
        memcpy(part, x + at, min(2 * WIDTH, job->inputs - at) * 2);
        if (X_BYTES == 2)
            memcpy(to, part, sizeof part);
        else
            PACK_FLOATS(to, part, WIDTH)
    }
}

// sums[n][m] += w[n] . x[m] of a vector; fetches what lies `ahead` bytes behind it.
TARGET INLINE void NAME(add)(NAME(Vector) (*sums)[MOST], const uint16_t *w, int64_t stride, int64_t ahead,
                             const char *x, int64_t row_bytes, const int rows) {
    UNROLL for (int n = 0; n < STRIP; n++) {
        NAME(Words) word = *(const NAME(Words) *)(w + n * stride);
        if (ahead) __builtin_prefetch((const void *)((uintptr_t)(w + n * stride) + ahead));
        UNROLL for (int m = 0; m < rows; m++) {
            const char *from = x + m * row_bytes;
#if X_BYTES == 2
            sums[n][m] = (NAME(Vector))_mm512_dpbf16_ps((__m512)sums[n][m], (__m512bh)_mm512_loadu_si512(from),
                                                        (__m512bh)word);
#else
            sums[n][m] += *(const NAME(Vector) *)from * (NAME(Vector))(word << 16);
            sums[n][m] += *(const NAME(Vector) *)(from + 4 * WIDTH) * (NAME(Vector))(word & (int32_t)0xffff0000);
#endif
        }
    }
}

TARGET INLINE float NAME(total)(NAME(Vector) sums) {
#if WIDTH == 16
    return _mm512_reduce_add_ps((__m512)sums);
#else
    float sum = 0;
    UNROLL for (int i = 0; i < WIDTH; i++) sum += sums[i];
    return sum;
#endif
}

// `rows` rows of x with STRIP outputs, of which `present` are there: what is beyond is computed with the last one.
TARGET INLINE void NAME(multiply)(const Job *job, int64_t row, int64_t output, int64_t present, const int rows) {
    enum { INPUTS = 2 * WIDTH };
    NAME(Vector) sums[STRIP][MOST] = {0};
    const int64_t inputs = job->inputs, whole = inputs / INPUTS * INPUTS;
    const uint16_t *w = job->w + output * inputs;
    const char *x = (const char *)job->packed + row * job->row_bytes;
    int64_t stride = present == STRIP ? inputs : 0, ahead = row ? 0 : STRIP * inputs * 2;
    for (int64_t at = 0; at < whole; at += INPUTS, x += INPUTS * X_BYTES)
        NAME(add)(sums, w + at, stride, ahead, x, job->row_bytes, rows);
    if (whole < inputs) {
        uint16_t rest[STRIP][INPUTS] = {0};
        for (int n = 0; n < STRIP; n++) memcpy(rest[n], w + n * stride + whole, (inputs - whole) * 2);
        NAME(add)(sums, rest[0], INPUTS, 0, x, job->row_bytes, rows);
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < present; n++) {
            float sum = NAME(total)(sums[n][m]);
            if (job->bias) sum += from_bf16(job->bias[output + n]);
            job->y[(row + m) * job->outputs + output + n] = to_bf16(sum);
        }
}

TARGET static NOINLINE void NAME(strip)(const Job *job, int64_t output, int64_t present) {
    int64_t blocks = divide_up(job->rows, MOST), row = 0;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t rows = divide_up(job->rows - row, blocks - block);
        switch (rows) {
            case 1: NAME(multiply)(job, row, output, present, 1); break;
            case 2: NAME(multiply)(job, row, output, present, 2); break;
#if MOST > 2
            case 3: NAME(multiply)(job, row, output, present, 3); break;
            case 4: NAME(multiply)(job, row, output, present, 4); break;
#endif
#if MOST > 4
            case 5: NAME(multiply)(job, row, output, present, 5); break;
            default: NAME(multiply)(job, row, output, present, 6);
#endif
        }
        row += rows;
    }
}

TARGET static void NAME(run)(const Job *job, int64_t first, int64_t last) {
    for (; first + STRIP <= last; first += STRIP) NAME(strip)(job, first, STRIP);
    for (; first < last; first++) NAME(strip)(job, first, 1);
}

#undef NAME
#undef TARGET
#undef WIDTH
#undef MOST
#undef X_BYTES
