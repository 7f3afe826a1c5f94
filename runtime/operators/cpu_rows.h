// One path of cpu.c, in the instruction set of the includer's macros.
//     NAME(x) TARGET    suffix and target attribute of every function

TARGET INLINE void NAME(norm_row)(const Norm *job, const void *restrict x, void *restrict y, const int64_t type,
                                  const int64_t form) {
    const void *restrict weight = job->weight;
    int64_t size = job->size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += get(x, type, i) * get(x, type, i);
    float factor = 1 / sqrtf(sum / size + job->eps);
    for (int64_t i = 0; i < size; i++) {
        float value = get(x, type, i) * factor, w = get(weight, type, i);
        if (form == ROUNDED) value = rounded(value, type);
        put(y, type, i, value * (form == ONE_PLUS ? w + 1 : w));
    }
}

TARGET static void NAME(norm)(const Norm *job, int64_t row) {
    int64_t from = row / job->inner * job->outer_stride + row % job->inner * job->inner_stride;
    const void *x = at(job->x, job->type, from);
    void *y = (void *)at(job->y, job->type, row * job->size);
#define RUN(type)                                                          \
    switch (job->form) {                                                   \
        case ROUNDED: NAME(norm_row)(job, x, y, type, ROUNDED); break;     \
        case LATE: NAME(norm_row)(job, x, y, type, LATE); break;           \
        default: NAME(norm_row)(job, x, y, type, ONE_PLUS);                \
    }
    BY_TYPE(job->type, RUN)
#undef RUN
}

TARGET INLINE void NAME(gate_row)(const void *restrict gate, const void *restrict up, void *restrict y, int64_t size,
                                  const int64_t type, const int64_t activation) {
    for (int64_t i = 0; i < size; i++) {
        float g = get(gate, type, i), inner = g;
        // A half of 1 + tanh is the logistic function of twice its argument.
        if (activation == GELU_TANH) inner = 1.5957691216057308f * (g + 0.044715f * g * g * g);
        put(y, type, i, rounded(times_logistic(g, inner), type) * get(up, type, i));
    }
}

TARGET static void NAME(gate)(const Gate *job, int64_t row) {
    const void *gate = at(job->gate, job->type, row * job->gate_stride);
    const void *up = at(job->up, job->type, row * job->up_stride);
    void *y = (void *)at(job->y, job->type, row * job->size);
#define RUN(type)                                                                          \
    if (job->activation == SILU)                                                           \
        NAME(gate_row)(gate, up, y, job->size, type, SILU);                                \
    else                                                                                   \
        NAME(gate_row)(gate, up, y, job->size, type, GELU_TANH);
    BY_TYPE(job->type, RUN)
#undef RUN
}

TARGET INLINE void NAME(rotate_heads)(const Heads *heads, int64_t token, const void *restrict cos, const void *restrict sin,
                                      int64_t half, const int64_t type) {
    for (int64_t head = 0; head < heads->heads; head++) {
        const void *restrict x = at(heads->x, type, token * heads->token_stride + head * heads->head_stride);
        void *restrict y = (void *)at(heads->y, type, (token * heads->heads + head) * 2 * half);
        for (int64_t i = 0; i < half; i++) {
            float first = get(x, type, i), second = get(x, type, half + i);
            float a = rounded(first * get(cos, type, i), type), b = rounded(second * get(sin, type, i), type);
            float c = rounded(second * get(cos, type, half + i), type), d = rounded(first * get(sin, type, half + i), type);
            put(y, type, i, a - b);
            put(y, type, half + i, c + d);
        }
    }
}

TARGET static void NAME(rotary)(const Rotary *job, int64_t token) {
    const void *cos = at(job->cos, job->type, token * job->cos_stride);
    const void *sin = at(job->sin, job->type, token * job->sin_stride);
#define RUN(type)                                                       \
    NAME(rotate_heads)(&job->q, token, cos, sin, job->half, type);      \
    NAME(rotate_heads)(&job->k, token, cos, sin, job->half, type);
    BY_TYPE(job->type, RUN)
#undef RUN
}

#undef NAME
#undef TARGET
