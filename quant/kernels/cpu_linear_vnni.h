// The int8 path of cpu_linear.c, for layers whose inputs are quantized and weights of integers: sums of products of integers,
// exact within a group. Codes are multiplied as they are, unsigned, so that nothing has to be taken off for the sign of x:
//     y[n] = sum over groups of scale * step * (sum of x * code - zero * sum of x).
//
// x is rounded as quant/activation.py does it, in the same type: a step for a token, or for a group of its inputs.

// As the type holds it.
AVX512 INLINE __m512 rounded_to(int64_t type, __m512 value) {
    if (type == FLOAT16) {
        __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
        return _mm512_cvtph_ps(half);
    }
    if (type == FLOAT32) return value;
    __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

// Up to 16 inputs, zeros behind them.
AVX512 INLINE __m512 load_inputs(const Job *job, int64_t row, int64_t at, int64_t count) {
    const __mmask16 present = (__mmask16)(count < LANES ? (1 << count) - 1 : 0xffff);
    at += row * job->inputs;
    if (job->input_type == FLOAT32) return _mm512_maskz_loadu_ps(present, (const float *)job->x + at);
    __m256i half = _mm256_maskz_loadu_epi16(present, (const uint16_t *)job->x + at);
    if (job->input_type == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The codes of one row in the layer's input order, and the step of every group. A row with NaN gets steps of NaN.
AVX512 static void quantize_vnni(const Job *job, int64_t row) {
    const int64_t type = job->code_type, span = job->input_group;
    const __m512 low = _mm512_set1_ps(-128), high = _mm512_set1_ps(127);
    int8_t *codes = job->codes + row * job->inputs;
    for (int64_t first = 0; first < job->inputs; first += span) {
        const int64_t count = min(span, job->inputs - first);
        __m512i largest = _mm512_setzero_si512();  // as bits, where NaN is larger than every number
        for (int64_t i = 0; i < count; i += LANES) {
            __m512i bits = _mm512_castps_si512(load_inputs(job, row, first + i, count - i));
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX)));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(largest), infinite = 0x7f800000;
        float step = (float)job->input_scale;
        if (step == 0) {
            step = _mm512_cvtss_f32(rounded_to(type, _mm512_set1_ps(as_float(bits) / 127.5f)));
        }
        const __m512 divisor = _mm512_set1_ps(step);
        for (int64_t i = 0; i < count; i += LANES) {
            __m512 value = rounded_to(type, _mm512_div_ps(load_inputs(job, row, first + i, count - i), divisor));
            __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
            const __mmask16 present = (__mmask16)(count - i < LANES ? (1 << (count - i)) - 1 : 0xffff);
            _mm512_mask_cvtepi32_storeu_epi8(codes + first + i, present, code);
        }
        if (bits > infinite || (bits == infinite && job->input_scale == 0)) step = as_float(0x7fc00000);
        for (int64_t group = first / job->group; group * job->group < first + count; group++)
            job->steps[group * job->row_limit + row] = step;
    }
}

// Bytes in the order in which codes lie in the bytes of a shifted word: `shift_of`, read backwards.
AVX512 static void pack_vnni(const Job *job, int64_t block, int64_t group) {
    const int rows = block_rows(job, block), nibbles = job->kind == NIBBLE_INTEGERS;
    const __m128i turn = nibbles ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                 : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    int32_t *to = (int32_t *)((int8_t *)job->packed + (block * ROWS * job->groups + group * rows) * job->padded);
    const int64_t first = group * job->group, count = min(job->group, job->inputs - first);
    for (int r = 0; r < rows; r++) {
        const int64_t row = block * ROWS + r;
        const int8_t *from = job->codes + row * job->inputs;
        int32_t sum = 0;
        for (int64_t at = 0; at < job->padded; at += LANES) {
            ALIGNED int8_t codes[LANES] = {0};
            const int64_t here = row < job->rows ? max(0, min(LANES, count - at)) : 0;
            if (job->order)
                for (int i = 0; i < here; i++) codes[i] = from[job->order[first + at + i]];
            else
                memcpy(codes, from + first + at, here);
            UNROLL for (int i = 0; i < LANES; i++) sum += codes[i];
            ALIGNED int32_t words[LANES / 4];
            _mm_store_si128((__m128i *)words, _mm_shuffle_epi8(_mm_load_si128((__m128i *)codes), turn));
            for (int i = 0; i < min(LANES, job->padded - at) / 4; i++) to[(at / 4 + i) * rows + r] = words[i];
        }
        ((int32_t *)job->sums)[group * job->row_limit + row] = sum;
    }
}

// Codes of four inputs of every lane, unsigned.
VNNI INLINE __m512i code_bytes(__m512i word, const int kind, const int step) {
    if (kind == BYTE_INTEGERS) return _mm512_xor_si512(word, _mm512_set1_epi8((char)0x80));
    enum { AND_THEN_XOR = 0x6a };  // (a & b) ^ c
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4 * step), _mm512_set1_epi8(15), _mm512_set1_epi8(8),
                                     AND_THEN_XOR);
}

VNNI INLINE void multiply_vnni(const Job *job, int64_t tile, int64_t block, const int kind, const int rows) {
    const int steps = per_word(kind) / 4;
    const int chains = rows < 4 ? steps : 1;  // independent sums hide each other's latency
    const int64_t count = job->padded / per_word(kind);
    const int32_t *x = (const int32_t *)((const int8_t *)job->packed + block * ROWS * job->groups * job->padded);
    float total[ROWS][TILE] ALIGNED, scales[TILE] ALIGNED, offsets[TILE] ALIGNED;
    memset(total, 0, sizeof total);
    for (int64_t group = 0; group < job->groups; group++) {
        const int32_t *sums = (const int32_t *)job->sums + group * job->row_limit + block * ROWS;
        const float *step_of = job->steps + group * job->row_limit + block * ROWS;
        load_avx512(job, tile, group, scales, offsets);
        const uint32_t *words = codes(job, kind, tile, group);
        __m512i sum[ROWS][2][2];
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 below = _mm512_load_ps(offsets + half * LANES);  // minus the zero code, counted from the middle one
            __m512i zero = _mm512_cvtps_epi32(_mm512_sub_ps(below, _mm512_set1_ps(kind == BYTE_INTEGERS ? 128 : 8)));
            UNROLL for (int r = 0; r < rows; r++) {
                sum[r][half][0] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[r]));
                sum[r][half][1] = _mm512_setzero_si512();
            }
        }
        for (int64_t i = 0; i < count; i++, words += LANES, x += steps * rows) {
            __m512i low = _mm512_loadu_si512(words), high = _mm512_loadu_si512(words + count * LANES);
            __builtin_prefetch(words + AHEAD);
            __builtin_prefetch(words + count * LANES + AHEAD);
            UNROLL for (int step = 0; step < steps; step++) {
                __m512i first = code_bytes(low, kind, step), second = code_bytes(high, kind, step);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m512i four = _mm512_set1_epi32(x[step * rows + r]);
                    sum[r][0][step % chains] = _mm512_dpbusd_epi32(sum[r][0][step % chains], first, four);
                    sum[r][1][step % chains] = _mm512_dpbusd_epi32(sum[r][1][step % chains], second, four);
                }
            }
        }
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 scale = _mm512_load_ps(scales + half * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512i whole = chains == 2 ? _mm512_add_epi32(sum[r][half][0], sum[r][half][1]) : sum[r][half][0];
                __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(step_of[r]));
                float *to = total[r] + half * LANES;
                _mm512_store_ps(to, _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(whole), _mm512_load_ps(to)));
            }
        }
    }
    for (int r = 0; r < rows && block * ROWS + r < job->rows; r++) store_avx512(job, block * ROWS + r, tile, total[r]);
}

VNNI INLINE void run_kind_vnni(const Job *job, int64_t tile, int64_t first, int64_t last, const int kind) {
    for (int64_t block = first / ROWS; block * ROWS < last; block++) switch (block_rows(job, block)) {
        case 1: multiply_vnni(job, tile, block, kind, 1); break;
        case 2: multiply_vnni(job, tile, block, kind, 2); break;
        case 4: multiply_vnni(job, tile, block, kind, 4); break;
        default: multiply_vnni(job, tile, block, kind, ROWS);
    }
}

VNNI static void run_vnni(const Job *job, int64_t tile, int64_t first, int64_t last) {
    if (job->kind == BYTE_INTEGERS)
        run_kind_vnni(job, tile, first, last, BYTE_INTEGERS);
    else
        run_kind_vnni(job, tile, first, last, NIBBLE_INTEGERS);
}
