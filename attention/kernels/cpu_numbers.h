// Numbers as cpu.c meets them, one and many at a time: formats of 8 bits, functions of the softmax, rows turned to columns.
// The includer says how many KEYS a column of keys has.

enum { INT8 = FLOAT16 + 1, FP8_E4M3 };  // after the number formats of native.h

// OCP 8-bit floating point, E4M3: exponent bias 7, no infinities, NaN is all ones.
INLINE float from_fp8(uint8_t code) {
    uint32_t magnitude = code & 0x7f, sign = (uint32_t)(code & 0x80) << 24;
    float value = as_float(magnitude << 20) * 0x1p120f;
    return as_float((magnitude == 0x7f ? 0x7fc00000 : as_bits(value)) | sign);
}

// To nearest, ties to even; |value| is at most 448, or it is NaN.
INLINE uint8_t to_fp8(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0x1p14f) - as_bits(0x1p14f);  // the sum's last bit is 2^-9
    uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120 << 23)) >> 20;
    return (value != value ? 0x7f : magnitude < as_bits(0x1p-6f) ? subnormal : normal) | (bits >> 24 & 0x80);
}

INLINE float value_of(const void *data, int64_t type, int64_t i) {
    switch (type) {
        case FLOAT32: return ((const float *)data)[i];
        case BFLOAT16: return from_bf16(((const uint16_t *)data)[i]);
        case FLOAT16: return from_f16(((const uint16_t *)data)[i]);
        case INT8: return ((const int8_t *)data)[i];
        default: return from_fp8(((const uint8_t *)data)[i]);
    }
}

// For x <= 0; NaN stays NaN.
INLINE float exp_of(float x) {
    float rest, power = exponential(x < -87 ? -87 : x, &rest);
    return x < -87 ? 0 : power + power * rest;
}

INLINE float tanh_of(float x) {
    float rest, power = exponential(x < -10 ? -20 : x > 10 ? 20 : 2 * x, &rest);
    float less_one = (power - 1) + power * rest;
    return less_one / (less_one + 2);
}

// Element `step` to `step + 3` of 4, 8 or 16 rows as columns of `to`.
INLINE void transpose_portable(const void *const *rows, int64_t step, void *to) {
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) memcpy((char *)to + 4 * (k * KEYS + i), (const char *)rows[i] + 4 * (step + k), 4);
}

#ifdef X86
INLINE __m128i four(const void *row, int64_t step) { return _mm_loadu_si128((const __m128i *)row + step / 4); }

AVX2 INLINE void transpose_avx2(const void *const *rows, int64_t step, void *to) {
    __m256i in[4], *out = to;
    for (int i = 0; i < 4; i++) in[i] = _mm256_set_m128i(four(rows[4 + i], step), four(rows[i], step));
    __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpackhi_epi32(in[0], in[1]);
    __m256i c = _mm256_unpacklo_epi32(in[2], in[3]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    _mm256_store_si256(out, _mm256_unpacklo_epi64(a, c));
    _mm256_store_si256(out + KEYS / 8, _mm256_unpackhi_epi64(a, c));
    _mm256_store_si256(out + KEYS / 8 * 2, _mm256_unpacklo_epi64(b, d));
    _mm256_store_si256(out + KEYS / 8 * 3, _mm256_unpackhi_epi64(b, d));
}

AVX512 INLINE void transpose_avx512(const void *const *rows, int64_t step, void *to) {
    __m512i in[4], *out = to;
    for (int i = 0; i < 4; i++) {
        in[i] = _mm512_castsi128_si512(four(rows[i], step));
        in[i] = _mm512_inserti32x4(in[i], four(rows[4 + i], step), 1);
        in[i] = _mm512_inserti32x4(in[i], four(rows[8 + i], step), 2);
        in[i] = _mm512_inserti32x4(in[i], four(rows[12 + i], step), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpackhi_epi32(in[0], in[1]);
    __m512i c = _mm512_unpacklo_epi32(in[2], in[3]), d = _mm512_unpackhi_epi32(in[2], in[3]);
    _mm512_store_si512(out, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(out + KEYS / 16, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(out + KEYS / 16 * 2, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(out + KEYS / 16 * 3, _mm512_unpackhi_epi64(b, d));
}
#endif
