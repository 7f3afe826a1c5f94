// The AMX path of cpu_linear.c.
//
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
AMX INLINE void decode_kind_amx(const Job *job, const uint32_t *words, uint16_t *to, const int kind) {
    for (int i = 0; i < 32 / per_word(kind); i++, words += LANES) {
        __m512i word = _mm512_loadu_si512(words);
        __builtin_prefetch(words + AHEAD);
        UNROLL for (int step = 0; step < per_word(kind) / 2; step++, to += 32)
            _mm512_store_si512(to, bf16_pairs(job, word, kind, step));
    }
}

AMX INLINE void decode_amx(const Job *job, const uint32_t *words, uint16_t *to) {
    switch (job->kind) {
        case BYTE_INTEGERS: decode_kind_amx(job, words, to, BYTE_INTEGERS); break;
        case BYTE_FLOATS: decode_kind_amx(job, words, to, BYTE_FLOATS); break;
        default: decode_kind_amx(job, words, to, NIBBLE_TABLE);
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
    const int kind = (int)job->kind;
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
                    const uint32_t *words = codes(job, kind, tile, group) + k / per_word(kind) * LANES;
                    decode_amx(job, words, weight[half] + i * AMX_TILE);
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
