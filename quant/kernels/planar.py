"""The layout in which GPU kernels want their weights: words of 32 bits whose bits are *planes* of neighbouring columns.

Codes are stored in 4 or 8 bits, so a word holds 8 or 4 planes. Columns come in blocks of ``planes * WIDTH``; word ``i`` of a
block holds columns ``i``, ``WIDTH + i``, ``2 * WIDTH + i``, ..., the first in its lowest bits. So one shift and one mask give
a program the codes of ``WIDTH`` columns that lie beside each other in ``x``, and nothing has to be moved between threads: a
product is the sum of the products of the planes. Words are stored ``[blocks, out, WIDTH]``: what a program reads of a block
is one piece of memory.

No group of columns with one scale crosses the border of a plane, or else of a block. Groups that would are filled up with
columns that multiply a zero; ``order`` then says which input comes where, as it does for act-order checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.base import QuantWeight, WeightKind
from quant.packing import unpack_stream

MOST_TILES = 4096
"""Of an output whose parts are added up in the same launch; each has a counter."""


@dataclass(frozen=True)
class PlanarWeight(QuantWeight):
    """``q``: ``int32 [blocks, out, width]``. ``scale``: ``[groups, out]``, float32, float16 or bfloat16. ``zero``: ``uint8``
    like ``scale``. ``order``: ``int32 [columns]``, the input of every column, the number of inputs for a zero."""

    group: int = 0
    """Columns of a group, those that fill it up counted in; the number of all columns if a row has one scale."""
    filled: bool = False
    """Whether some columns of ``order`` multiply a zero."""
    values: tuple[float, ...] | None = None
    """Of the table, for the code that is made of them."""
    counters: Tensor | None = None
    """``int32 [MOST_TILES]``, zeros: the parts of each tile that are done. One launch at a time may use them."""

    @property
    def width(self) -> int:
        return self.q.shape[2]

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return stored_bits(self.scheme.kind)

    @property
    def block(self) -> int:
        """Columns of a block."""
        return block_columns(self.bits, self.width)

    @property
    def columns(self) -> int:
        return self.q.shape[0] * self.block

    @property
    def grouped(self) -> bool:
        return self.scale.shape[0] > 1

    def inputs(self, x: Tensor) -> Tensor:
        """``x [rows, in]`` in the order of the columns, as far as it is not the natural one."""
        if self.order is None:
            return x
        return (F.pad(x, (0, 1)) if self.filled else x).index_select(1, self.order)


def stored_bits(kind: WeightKind) -> int:
    return 4 if kind.bits <= 4 else 8


def block_columns(bits: int, width: int) -> int:
    return 32 // bits * width


def columns_of_group(group: int, block: int, width: int) -> int:
    """The least number of columns, at least ``group``, that crosses no border it must not cross."""
    if group > block // 2:
        return -(-group // block) * block
    return max(width, 1 << (group - 1).bit_length())


def planar(weight: QuantWeight, width: int) -> PlanarWeight:
    """A canonical weight in this layout."""
    scheme, shape = weight.scheme, weight.shape
    outputs, inputs = shape.out_features, shape.in_features
    bits = stored_bits(scheme.kind)
    block = block_columns(bits, width)
    order = weight.order

    group = min(scheme.group, inputs)
    groups = -(-inputs // group)
    codes = (
        weight.q.view(torch.uint8)
        if scheme.kind is WeightKind.FP8
        else unpack_stream(weight.q, scheme.kind.bits, inputs)
    )
    columns = -(-inputs // block) * block if groups == 1 else columns_of_group(group, block, width)
    if groups > 1 and columns != group:
        order = torch.arange(inputs, dtype=torch.int32, device=codes.device) if order is None else order
        spread = F.pad(order, (0, groups * group - inputs), value=inputs).view(groups, group)
        order = F.pad(spread, (0, columns - group), value=inputs).flatten()
        codes = F.pad(codes, (0, groups * group - inputs)).view(outputs, groups, group)
        codes = F.pad(codes, (0, columns - group)).flatten(1)
    missing = -codes.shape[1] % block
    if missing and order is not None:
        order = F.pad(order, (0, missing), value=inputs)
    planes = F.pad(codes, (0, missing)).view(outputs, -1, 32 // bits, width)
    octets = planes[:, :, 0::2] | planes[:, :, 1::2] << 4 if bits == 4 else planes
    words = octets.permute(1, 0, 3, 2).contiguous().view(torch.int32).squeeze(-1)

    def by_group(blocks: Tensor) -> Tensor:
        rows = blocks.view(outputs, groups) if scheme.flat else blocks.repeat_interleave(scheme.block[0], 0)[:outputs]
        return F.pad(rows, (0, words.shape[0] * block // columns - groups)).t().contiguous()

    scale = weight.scale
    if weight.global_scale is not None or scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        scale = scale.to(torch.float32) * (1 if weight.global_scale is None else weight.global_scale.float())
    table = weight.table
    return PlanarWeight(
        scheme,
        shape,
        words,
        by_group(scale),
        None if weight.zero is None else by_group(weight.zero),
        order,
        table,
        input_scale=weight.input_scale,
        input_zero=weight.input_zero,
        layout="planar",
        group=columns,
        filled=order is not None and order.numel() > inputs,
        values=None if table is None or table.is_meta else tuple(table.tolist()),
        counters=torch.zeros(MOST_TILES, dtype=torch.int32, device=codes.device),
    )
