"""Attention of sequences with several new tokens: prompts, whole or in chunks, many in one launch.

A program takes some queries of one sequence with all the query heads that share a key head, so that a tile of keys is
loaded once for all of them. Which sequence that is, it finds by itself: the grid has room for any distribution of the
tokens. The latest queries, which see most keys, start first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attention.base import AttentionBatch, AttentionSpec
from attention.kernels.shape import constants, device_of, stored
from attention.kernels.tile import attend_range, finished, first_visible, load_queries, start_softmax
from attention.kernels.tuned import Config, varlen_config
from attention.kv_cache import KVCache


@triton.jit
def sequence_of(program, starts, sequences, QUERIES: tl.constexpr):
    """The sequence that ``program`` works on: sequence ``b`` has the programs from ``starts[b] // QUERIES + b`` on."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def varlen_kernel(
    q, k_cache, v_cache, k_scale, v_scale, sinks, out, starts, lens, tables,
    table_stride, q_token, q_head, sequences, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K1: tl.constexpr,
    K2: tl.constexpr, V_PADDED: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, LATENT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = GROUP if GROUP < M else M  # query heads of a program
    QUERIES: tl.constexpr = M // MEMBERS
    HEAD_TILES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    BOUNDED: tl.constexpr = WINDOW > 0 or CHUNK > 0
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = sequence_of(program, starts, sequences, QUERIES)
    begin = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - begin
    skipped = (program - (begin // QUERIES + sequence)) * QUERIES
    if skipped >= count or count < 2:
        return

    head = tl.program_id(0) // HEAD_TILES
    row = tl.arange(0, M)
    query = skipped + row // MEMBERS
    member = (tl.program_id(0) % HEAD_TILES) * MEMBERS + row % MEMBERS
    live = (row < QUERIES * MEMBERS) & (query < count) & (member < GROUP)
    query_head = head * GROUP + member
    token = (begin + query).to(tl.int64)

    length = tl.load(lens + sequence)
    position = length - count + query
    first_query = length - count + skipped
    last_query = tl.minimum(first_query + QUERIES, length) - 1
    seen_first = first_visible(position, WINDOW, CHUNK)
    start = first_visible(first_query, WINDOW, CHUNK)
    stop = last_query + 1
    # From `full` to `partial` every query sees every key
    full = start
    if BOUNDED:
        full = start + tl.cdiv(first_visible(last_query, WINDOW, CHUNK) - start, N) * N
        full = tl.minimum(full, start + tl.cdiv(stop - start, N) * N)
    partial = full + tl.maximum(first_query + 1 - full, 0) // N * N

    q1, q2, factor = load_queries(q, token * q_token + query_head * q_head, live, scale, K_DIM, K1, K2, SCALED, KIND)
    acc, total, m, unit = start_softmax(sinks, query_head, live, True, M, V_PADDED, SINKS)
    table = tables + sequence.to(tl.int64) * table_stride
    if BOUNDED:
        acc, total, m, unit = attend_range(
            acc, total, m, unit, q1, q2, factor, start, full, stop, seen_first, position,
            table, k_cache, v_cache, k_scale, v_scale, head, cap,
            HEADS, K_DIM, V_DIM, K1, K2, V_PADDED, PAGE, SOFTCAP, SCALED, LATENT, N, MASKED=True, BOUNDED=True,
        )  # fmt: skip
    acc, total, m, unit = attend_range(
        acc, total, m, unit, q1, q2, factor, full, partial, stop, seen_first, position,
        table, k_cache, v_cache, k_scale, v_scale, head, cap,
        HEADS, K_DIM, V_DIM, K1, K2, V_PADDED, PAGE, SOFTCAP, SCALED, LATENT, N, MASKED=False, BOUNDED=False,
    )  # fmt: skip
    acc, total, m, unit = attend_range(
        acc, total, m, unit, q1, q2, factor, partial, stop, stop, seen_first, position,
        table, k_cache, v_cache, k_scale, v_scale, head, cap,
        HEADS, K_DIM, V_DIM, K1, K2, V_PADDED, PAGE, SOFTCAP, SCALED, LATENT, N, MASKED=True, BOUNDED=BOUNDED,
    )  # fmt: skip
    d = tl.arange(0, V_PADDED)
    target = out + (token * (HEADS * GROUP) + query_head) * V_DIM
    tl.store(
        target[:, None] + d[None, :],
        finished(acc, total, unit, SCALED).to(out.dtype.element_ty),
        mask=live[:, None] & (d < V_DIM)[None, :],
    )


def varlen(
    call: int,
    spec: AttentionSpec,
    q: Tensor,
    batch: AttentionBatch,
    cache: KVCache,
    sinks: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Fill the rows of ``out`` [T, H, Dv] that belong to sequences with two or more new tokens."""
    if config is None:
        capability = device_of(q.device.index).capability
        config = varlen_config(spec, q.dtype, cache.dtype, capability)
    group, sequences = spec.heads // spec.kv_heads, batch.kv_lens.shape[0]
    members = min(group, config.rows)
    programs = q.shape[0] // (config.rows // members) + sequences
    k_cache, v_cache, k_scale, v_scale = stored(cache, call)
    varlen_kernel[(spec.kv_heads * triton.cdiv(group, members), programs)](
        q, k_cache, v_cache, k_scale, v_scale, q if sinks is None else sinks, out,
        batch.query_starts, batch.kv_lens, batch.block_tables, batch.block_tables.stride(0), q.stride(0), q.stride(1),
        sequences, spec.scale, spec.softcap or 1.0,
        **constants(spec, q.dtype, cache), M=config.rows, N=config.keys,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
