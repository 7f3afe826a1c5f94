// What every C source that native.py builds may include: number formats, and which instructions this machine has.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define ALIGNED __attribute__((aligned(64)))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef X86
#define TARGETS(features) __attribute__((target(features)))
#define AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"
#define AVX2 TARGETS("avx2,fma")
#define AVX512 TARGETS(AVX512_FEATURES)
#define BF16 TARGETS("avx512bf16," AVX512_FEATURES)
#define VNNI TARGETS("avx512vnni," AVX512_FEATURES)
#define AMX TARGETS("amx-tile,amx-bf16," AVX512_FEATURES)
#endif

enum { FLOAT32, BFLOAT16, FLOAT16, E4M3, E8M0 };

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = as_bits(value);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float from_bf16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

INLINE float from_f16(uint16_t bits) {
    float magnitude = as_float((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f;
    uint32_t not_finite = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return as_float(as_bits(magnitude) | not_finite | (uint32_t)(bits & 0x8000) << 16);
}

// To nearest, ties to even.
INLINE uint16_t to_f16(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the sum's last bit is 2^-24
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23)) >> 13;
    uint32_t finite = magnitude < as_bits(0x1p-14f) ? subnormal : normal;
    uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return (magnitude < as_bits(65520.f) ? finite : large) | (bits >> 16 & 0x8000);
}

INLINE float from_e4m3(uint8_t bits) {  // not its NaN
    uint32_t magnitude = (uint32_t)(bits & 0x7f) << 20;
    float value = as_float(magnitude + (120u << 23));
    value += magnitude < 1u << 23 ? value - 0x1p-6f : 0;  // subnormals have no leading 1
    return as_float(as_bits(value) | (uint32_t)(bits & 0x80) << 24);
}

INLINE float from_e8m0(uint8_t bits) { return bits ? as_float((uint32_t)bits << 23) : 0x1p-127f; }

// e^x - 1 = power - 1 + power * rest, with power a power of two and rest small: both are exact where the other is not.
INLINE float exponential(float x, float *rest) {
    float n = (x * 0x1.715476p0f + 0x1.8p23f) - 0x1.8p23f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float series = 1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f));
    *rest = r + r * r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * series)));
    return as_float((uint32_t)((int32_t)n + 127) << 23);
}

const int openmp =
#ifdef _OPENMP
    1;
#else
    0;
#endif

// The last of portable, AVX2, AVX-512, AVX-512 with bfloat16, and AMX that this machine has; it has those before it too.
// Asks Linux for the use of AMX.
int detect(void) {
#ifdef X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    enum { AMX_BF16_AND_TILE = 1 << 22 | 1 << 24, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    int amx = (d & AMX_BF16_AND_TILE) == AMX_BF16_AND_TILE;
    return amx && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 4 : 3;
#else
    return 0;
#endif
}
