"""Writes the new keys and values of a forward to their slots, quantizing them on the way if the cache is quantized."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attention.kernels.shape import padded, stored
from attention.kv_cache import KVCache

ROWS = 16  # (token, head) pairs of one program
WARPS = 4


@triton.jit
def encode_e4m3(x):
    """The e4m3 codes of float32 numbers of magnitude 448 or less, rounded to even, on any architecture.

    Times 2**-120 the exponent of such a number is, in float32, the one that e4m3 gives it, subnormal numbers included; what
    is left is to round off 20 bits of the mantissa.
    """
    bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.uint32, bitcast=True)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def store_rows(
    new, token_stride, head_stride, cache, scales, static, token, head, slot, live,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, PADDED)
    inside = live[:, None] & (d < DIM)[None, :]
    rows = token * token_stride + head * head_stride
    x = tl.load(new + rows[:, None] + d[None, :], mask=inside, other=0.0)
    target = slot * HEADS + head
    kind: tl.constexpr = cache.dtype.element_ty
    if SCALED:
        largest: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
        x = x.to(tl.float32)
        # max leaves out NaN; the sum is 0, or NaN if a number of the row is not finite
        unfinite = tl.sum(x * 0.0, 1)
        if STATIC:
            scale = tl.load(static + head, mask=live, other=1.0) + unfinite
        else:
            scale = tl.div_rn(tl.max(tl.abs(x), 1) + unfinite, tl.full([x.shape[0]], largest, tl.float32))
            scale = tl.where(scale == 0.0, 1.0, scale)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        x = tl.minimum(tl.maximum(x, -largest), largest)
        if kind == tl.int8:
            x = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2**23: what is added leaves no bits for fractions
        else:
            x = encode_e4m3(x)
        tl.store(scales + target, scale, mask=live)
    tl.store(cache + (target * DIM)[:, None] + d[None, :], x.to(kind), mask=inside)


@triton.jit
def store_kv_kernel(
    k, v, slots, k_cache, v_cache, k_scale, v_scale, k_static, v_static, k_token, k_head, v_token, v_head, rows,
    HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    SCALED: tl.constexpr, K_STATIC: tl.constexpr, V_STATIC: tl.constexpr, LATENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token, head = row // HEADS, row % HEADS
    slot = tl.load(slots + token, mask=live, other=0)
    store_rows(
        k, k_token, k_head, k_cache, k_scale, k_static, token, head, slot, live,
        HEADS, K_DIM, K_PADDED, SCALED, K_STATIC,
    )  # fmt: skip
    if not LATENT:
        store_rows(
            v, v_token, v_head, v_cache, v_scale, v_static, token, head, slot, live,
            HEADS, V_DIM, V_PADDED, SCALED, V_STATIC,
        )  # fmt: skip


def store_kv(call: int, k: Tensor, v: Tensor, slots: Tensor, cache: KVCache, latent: bool = False) -> None:
    """What :meth:`KVCache.write` says of a call that shares nothing; of one that is ``latent``, keys are stored alone. The last
    dimension of ``k`` and ``v`` must be contiguous."""
    (tokens, heads, key_dim), value_dim = k.shape, v.shape[2]
    k_cache, v_cache, k_scale, v_scale = stored(cache, call, writing=True)
    static = cache.static[call]
    k_static, v_static = (  # where there are none, something that the kernel does not touch
        scale if own is None else own for own, scale in ((static.k, k_scale), (static.v, v_scale))
    )
    store_kv_kernel[(triton.cdiv(tokens * heads, ROWS),)](
        k, v, slots, k_cache, v_cache, k_scale, v_scale, k_static, v_static,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), tokens * heads,
        HEADS=heads, K_DIM=key_dim, V_DIM=value_dim, K_PADDED=padded(key_dim), V_PADDED=padded(value_dim),
        SCALED=cache.quantized, K_STATIC=static.k is not None, V_STATIC=static.v is not None, LATENT=latent,
        ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
