"""Attention of sequences that have one new token: all query heads of a key head together, the keys split over programs.

A split leaves its part of the output and the logarithm of its sum of weights; a second kernel adds the parts up. How many
splits there are depends on the device and the number of sequences; which keys a split gets, on the length that it finds.
Sequences with more new tokens, or none, are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.base import AttentionBatch, AttentionSpec
from attention.kernels.shape import constants, device_of, padded, stored
from attention.kernels.tile import attend_range, finished, first_visible, load_queries, start_softmax
from attention.kernels.tuned import Config, decode_config
from attention.kv_cache import KVCache

MOST_PARTIALS = 8192
"""Numbers that the reduction keeps in registers: splits times padded value dimension."""


@triton.jit
def decode_kernel(
    q, k_cache, v_cache, k_scale, v_scale, sinks, out, parts, logs, starts, lens, tables,
    table_stride, q_token, q_head, splits, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K1: tl.constexpr,
    K2: tl.constexpr, V_PADDED: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, LATENT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    HEAD_TILES: tl.constexpr = (GROUP + M - 1) // M
    head = tl.program_id(0) // HEAD_TILES
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - row != 1:
        return

    member = (tl.program_id(0) % HEAD_TILES) * M + tl.arange(0, M)
    live = member < GROUP
    query_head = head * GROUP + member
    d = tl.arange(0, V_PADDED)
    written = live[:, None] & (d < V_DIM)[None, :]

    length = tl.load(lens + sequence)
    first = first_visible(length - 1, WINDOW, CHUNK)
    share = tl.cdiv(tl.cdiv(length - first, N), splits) * N
    start = first + split * share
    stop = tl.minimum(start + share, length)
    part = (sequence * (HEADS * GROUP) + query_head) * splits + split
    if start >= stop:
        tl.store(logs + part, tl.full([M], float("-inf"), tl.float32), mask=live)
        return

    q1, q2, factor = load_queries(q + row * q_token, query_head * q_head, live, scale, K_DIM, K1, K2, SCALED, KIND)
    acc, total, m, unit = start_softmax(sinks, query_head, live, split == 0, M, V_PADDED, SINKS)
    last = tl.full([M], stop - 1, tl.int32)
    acc, total, m, unit = attend_range(
        acc, total, m, unit, q1, q2, factor, start, stop, stop, last, last,
        tables + sequence * table_stride, k_cache, v_cache, k_scale, v_scale, head, cap,
        HEADS, K_DIM, V_DIM, K1, K2, V_PADDED, PAGE, SOFTCAP, SCALED, LATENT, N, MASKED=True, BOUNDED=False,
    )  # fmt: skip
    acc = finished(acc, total, unit, SCALED)
    if WHOLE:
        target = out + (row * (HEADS * GROUP) + query_head) * V_DIM
        tl.store(target[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=written)
    else:
        tl.store(parts + (part * V_DIM)[:, None] + d[None, :], acc, mask=written)
        tl.store(logs + part, m + tl.log2(total), mask=live)


@triton.jit
def reduce_kernel(
    parts, logs, out, starts, splits,
    ALL_HEADS: tl.constexpr, V_DIM: tl.constexpr, V_PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    split, d = tl.arange(0, SPLITS), tl.arange(0, V_PADDED)
    part = (sequence * ALL_HEADS + head) * splits + split
    log = tl.load(logs + part, mask=split < splits, other=float("-inf"))
    used = log > float("-inf")  # nobody wrote the others
    weight = tl.exp2(log - tl.max(log, 0))
    values = tl.load(parts + (part * V_DIM)[:, None] + d[None, :], mask=used[:, None] & (d < V_DIM)[None, :], other=0.0)
    result = tl.sum(values * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (row * ALL_HEADS + head) * V_DIM + d, result.to(out.dtype.element_ty), mask=d < V_DIM)


def splits_of(programs: int, config: Config, processors: int, value_dim: int, most_keys: int) -> int:
    """Splits that fill ``processors`` if there are ``programs`` without any; none is worth less than two tiles."""
    wanted = config.programs * processors // programs
    return max(1, min(wanted, MOST_PARTIALS // padded(value_dim), most_keys // (2 * config.keys)))


def decode(
    call: int,
    spec: AttentionSpec,
    q: Tensor,
    batch: AttentionBatch,
    cache: KVCache,
    sinks: Tensor | None,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Fill the rows of ``out`` [T, H, Dv] that belong to sequences with one new token."""
    device = device_of(q.device.index)
    config = config or decode_config(spec, q.dtype, cache.dtype, device.capability)
    sequences, pages = batch.block_tables.shape
    tiles = spec.kv_heads * triton.cdiv(spec.heads // spec.kv_heads, config.rows)
    splits = splits_of(sequences * tiles, config, device.processors, spec.value_dim, pages * cache.block_size)
    whole = splits == 1
    parts = logs = out
    if not whole:
        parts = out.new_empty(sequences, spec.heads, splits, spec.value_dim, dtype=torch.float32)
        logs = out.new_empty(sequences, spec.heads, splits, dtype=torch.float32)
    k_cache, v_cache, k_scale, v_scale = stored(cache, call)
    decode_kernel[(tiles, splits, sequences)](
        q, k_cache, v_cache, k_scale, v_scale, q if sinks is None else sinks, out, parts, logs,
        batch.query_starts, batch.kv_lens, batch.block_tables, batch.block_tables.stride(0), q.stride(0), q.stride(1),
        splits, spec.scale, spec.softcap or 1.0,
        **constants(spec, q.dtype, cache), M=config.rows, N=config.keys, WHOLE=whole,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not whole:
        reduce_kernel[(spec.heads, sequences)](
            parts, logs, out, batch.query_starts, splits,
            ALL_HEADS=spec.heads, V_DIM=spec.value_dim, V_PADDED=padded(spec.value_dim),
            SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
