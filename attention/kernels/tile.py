"""One tile of keys: load, score, mask, and take part in the running softmax. Decode and varlen differ in the rest.

Exponentials are powers of two, with log2(e) in the factor of the scores. The key dimension comes in two pieces (576 is
512 + 64); the value dimension is padded. Whatever overruns is not loaded but set to 0, because memory that nobody wrote
may hold NaN, which no weight of 0 takes away.

Over a quantized cache the tensor cores multiply float16, which two instructions make of two codes, where bfloat16 would
take eight. What could leave its range is brought into it: a query is divided by its largest number, and the scales of the
values by the largest of them so far, the ``unit`` of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decoded(x, kind: tl.constexpr):
    """Stored numbers, or codes without their scale, as ``kind``, exactly."""
    if x.dtype == tl.uint8:  # e4m3 where the device does not know it: its bits, shifted, are a float16 of value / 256
        wide = x.to(tl.uint16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return half.to(kind) * 256.0
    elif x.dtype == tl.int8 and kind == tl.float16:  # 0x6400 is 1024, whose last bit counts 1
        wide = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16)
        return (wide | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        return x.to(kind)


@triton.jit
def load_rows(base, rows, d, live, DIM: tl.constexpr, OVERRUNS: tl.constexpr, MASKED: tl.constexpr):
    """``base[rows, d]``: rows that are not ``live`` and dimensions past ``DIM`` are 0."""
    pointers = base + rows[:, None] + d[None, :]
    if MASKED and OVERRUNS:
        return tl.load(pointers, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    elif OVERRUNS:
        return tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_queries(
    q, rows, live, scale, K_DIM: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, SCALED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The queries at element offsets ``rows`` in the two pieces of the key dimension, and what scales their scores: one
    number, or if ``SCALED`` one of each row."""
    q1 = load_rows(q, rows, tl.arange(0, K1), live, K_DIM, K1 > K_DIM, True)
    q2 = q1
    if K2 > 0:
        q2 = load_rows(q, rows, K1 + tl.arange(0, K2), live, K_DIM, K1 + K2 > K_DIM, True)
    factor = scale
    if SCALED:
        largest = tl.maximum(tl.max(tl.abs(q1.to(tl.float32)), 1), tl.max(tl.abs(q2.to(tl.float32)), 1))
        largest = tl.where(largest > 0, largest, 1.0)
        q1, q2 = q1.to(tl.float32) / largest[:, None], q2.to(tl.float32) / largest[:, None]
        factor = factor * largest
    return q1.to(KIND), q2.to(KIND), factor


@triton.jit
def of_rows(factor, SCALED: tl.constexpr):
    """A factor of :func:`load_queries`, to multiply scores by."""
    if SCALED:
        return factor[:, None]
    else:
        return factor


@triton.jit
def find_pages(table, position, stop, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """The page of each position, of those from ``stop`` on page 0; unsigned, for which a division is a shift."""
    entries = table + position.to(tl.uint32) // PAGE
    if MASKED:
        return tl.load(entries, mask=position < stop, other=0).to(tl.uint32)
    else:
        return tl.load(entries).to(tl.uint32)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a query at ``position`` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, first)
    if CHUNK > 0:
        first = tl.maximum(position // CHUNK * CHUNK, first)
    return first


@triton.jit
def start_softmax(sinks, head, live, takes_part, M: tl.constexpr, V_PADDED: tl.constexpr, SINKS: tl.constexpr):
    """Sum, total weight, maximum and unit of nothing; a sink is a score that came before, if it ``takes_part``."""
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if SINKS and takes_part:
        m = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        total = total + 1.0
    return tl.zeros([M, V_PADDED], tl.float32), total, m, 1e-30


@triton.jit
def attend_range(
    acc, total, m, unit, q1, q2, factor, start, end, stop, seen_first, seen_last,
    table, k_cache, v_cache, k_scale, v_scale, head, cap,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    V_PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, LATENT: tl.constexpr,
    N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys from ``start`` to ``end``, ``N`` at a time.

    ``MASKED``: keys from ``stop`` on are not read, and row ``i`` sees only those up to ``seen_last[i]`` and, if ``BOUNDED``,
    from ``seen_first[i]``. Otherwise every row sees every key, and ``end - start`` is a multiple of ``N``.

    ``LATENT``: values are the first part of the keys. If it is just the first of their two pieces, it is loaded once.
    """
    V_ROW: tl.constexpr = K_DIM if LATENT else V_DIM
    # The pages of a tile are found during the one before it, or the pipeline would spend a stage on finding them; over
    # codes, which leave no registers for that, it does.
    AHEAD: tl.constexpr = not SCALED
    d1, dv, lanes = tl.arange(0, K1), tl.arange(0, V_PADDED), tl.arange(0, N)
    k_base, v_base = k_cache + head * K_DIM, v_cache + head * V_ROW
    if AHEAD:
        pages = find_pages(table, start + lanes, stop, PAGE, True)
    for tile in range(start, end, N):
        position = tile + lanes
        live = position < stop
        if not AHEAD:
            pages = find_pages(table, position, stop, PAGE, MASKED)
        slot = (pages * PAGE + position.to(tl.uint32) % PAGE).to(tl.int64)
        if AHEAD:
            pages = find_pages(table, position + N, stop, PAGE, True)

        rows = slot * (HEADS * K_DIM)
        k1 = load_rows(k_base, rows, d1, live, K_DIM, K1 > K_DIM, MASKED)
        scores = tl.dot(q1, tl.trans(decoded(k1, q1.dtype)), input_precision="ieee")
        if K2 > 0:
            k2 = load_rows(k_base, rows, K1 + tl.arange(0, K2), live, K_DIM, K1 + K2 > K_DIM, MASKED)
            scores = tl.dot(q2, tl.trans(decoded(k2, q2.dtype)), scores, input_precision="ieee")
        if SCALED:
            scores *= tl.load(k_scale + slot * HEADS + head, mask=live, other=0.0)[None, :]
        if SOFTCAP:
            # tanh(x) is 2 * sigmoid(2 x) - 1
            scores = (2.0 * tl.sigmoid(scores * of_rows(2.0 * factor / cap, SCALED)) - 1.0) * (cap * 1.4426950408889634)
            power, powers = 1.0, 1.0
        else:
            power = factor * 1.4426950408889634
            powers = of_rows(power, SCALED)
        if MASKED:
            seen = position[None, :] <= seen_last[:, None]
            if BOUNDED:
                seen &= position[None, :] >= seen_first[:, None]
            scores = tl.where(seen, scores, float("-inf"))

        highest = tl.maximum(m, tl.max(scores, 1) * power)
        offset = highest
        if MASKED:  # a row that has seen nothing yet: -inf less -inf would be NaN
            offset = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores * powers - offset[:, None])
        decay = tl.exp2(m - offset)
        total = total * decay + tl.sum(weights, 1)
        m = highest

        if LATENT and V_DIM == K1 and V_PADDED == K1:
            v = k1
        else:
            v = load_rows(v_base, slot * (HEADS * V_ROW), dv, live, V_DIM, V_PADDED > V_DIM, MASKED)
        if SCALED:
            v_scales = tl.load(v_scale + slot * HEADS + head, mask=live, other=0.0)
            larger = tl.maximum(unit, tl.max(v_scales, 0))
            weights *= (v_scales / larger)[None, :]
            decay *= unit / larger
            unit = larger
        acc *= decay[:, None]
        acc = tl.dot(weights.to(q1.dtype), decoded(v, q1.dtype), acc, input_precision="ieee")
    return acc, total, m, unit


@triton.jit
def finished(acc, total, unit, SCALED: tl.constexpr):
    """The attention that the running softmax stands for."""
    if SCALED:
        acc *= unit
    return acc / total[:, None]
