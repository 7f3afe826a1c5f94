"""Every bit order in one place: integers of 2 to 8 bits in wider words, and what 4-bit floats mean.

The canonical order of this project, and of GPTQ, compressed-tensors (:func:`unpack_words`) and AWQ's later versions, is
a continuous stream of codes, least significant bit first. AWQ's ``gemm`` version interleaves the eight codes of a word
instead; ``gemv_fast`` interleaves four rows; GPTQModel's planar form splits every code into planes; Marlin stores tiles of
16 x 64.

Words are read as the bytes that they are in a safetensors file: little-endian.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column ``c`` of eight sits in bits ``4 * AWQ_NIBBLE_OF_COLUMN[c]`` of the word (AutoAWQ 0.2.9, ``gemm``)."""

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the planes of a planar code, low bits first; other widths have one plane, which is the stream.

Source: GPTQModel 7.7.0, ``utils/planar_packing.py``.
"""

CACHED_WORDS = 1 << 18
"""How many words of 32 bits are permuted at once, so that they stay in a core's cache."""

MARLIN_TILE = (16, 64)
"""Inputs x outputs that are permuted as one."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 4-bit codes of E2M1 mean: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0)."""


def as_bytes(words: Tensor) -> Tensor:
    """``[rows, count]`` integers of any width as the bytes of each row, ``uint8 [rows, bytes]``."""
    return words.contiguous().view(torch.uint8)


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """``uint8 [rows, bytes]``, a continuous least-significant-bit-first stream a row, to ``uint8 [rows, count]`` codes."""
    if bits == 8:
        return packed[:, :count].contiguous()
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :count].contiguous()
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed[:, :, None] >> shifts & 1).flatten(1)[:, : count * bits]
    weights = (1 << torch.arange(bits, device=packed.device)).to(torch.uint8)
    return (stream.reshape(-1, count, bits) * weights).sum(-1, dtype=torch.uint8)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """``uint8 [rows, count]`` codes to ``uint8 [rows, ceil(count * bits / 8)]``; the inverse of :func:`unpack_stream`."""
    if bits == 8:
        return codes.contiguous()
    rows, count = codes.shape
    if bits == 4:
        padded = torch.nn.functional.pad(codes, (0, count % 2))
        return padded[:, 0::2] | padded[:, 1::2] << 4
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes[:, :, None] >> shifts & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(rows, -1, 8)
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_planar(packed: Tensor, bits: int, count: int) -> Tensor:
    """GPTQModel's planar order: ``uint8 [rows, bytes]`` to ``uint8 [rows, count]`` codes.

    Every 32 codes take ``bits`` words of 32 bits: first the low bits of all of them, then the planes above.
    """
    rows = packed.shape[0]
    blocks = packed.reshape(-1, 4 * bits)
    codes = torch.zeros(len(blocks), 32, dtype=torch.uint8, device=packed.device)
    start = offset = 0
    for width in PLANES[bits]:
        plane = blocks[:, start : start + 4 * width].contiguous()
        codes |= unpack_stream(plane, width, 32) << offset
        start, offset = start + 4 * width, offset + width
    return codes.reshape(rows, -1)[:, :count].contiguous()


def transpose_awq(words: Tensor) -> Tensor:
    """AWQ ``gemm``: ``int32 [rows, columns / 8]`` to 4-bit codes, a stream a column, ``uint8 [columns, ceil(rows / 2)]``.

    Eight words are a matrix of 8 x 8 codes. Its halves, quarters and eighths are swapped across the diagonal (Hacker's
    Delight 7-3), so that no code ever takes more than its 4 bits.
    """
    rows, count = words.shape
    words = torch.nn.functional.pad(words, (0, 0, 0, -rows % 8))
    blocks = len(words) // 8
    result = words.new_empty(count, 8, blocks)
    for first in range(0, count, step := max(1, CACHED_WORDS // len(words))):
        part = words[:, first : first + step].clone(memory_format=torch.contiguous_format).view(blocks, 8, -1)
        for distance, low_bits in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
            upper, lower = part.view(blocks, 4 // distance, 2, distance, -1).unbind(2)
            moved = (upper >> 4 * distance ^ lower) & low_bits
            lower ^= moved
            upper ^= moved << 4 * distance
        for column, nibble in enumerate(AWQ_NIBBLE_OF_COLUMN):
            result[first : first + step, column] = part[:, nibble].t()
    return as_bytes(result.view(8 * count, blocks))[:, : -(-rows // 2)].contiguous()


def unpack_awq_fast(words: Tensor) -> Tensor:
    """AWQ ``gemv_fast``: ``int16 [rows / 4, columns]`` to ``uint8 [rows, columns]`` 4-bit codes.

    64 columns of four rows follow each other; within 32 columns, pairs are dealt out to four lanes, and then even and odd
    positions of eight are parted (AutoAWQ 0.2.9, ``pack_intweight`` of ``awq/modules/linear/gemv_fast.py``).
    """
    quads, columns = words.shape
    nibbles = unpack_stream(as_bytes(words), 4, 4 * columns)
    rows = nibbles.view(quads, columns // 64, 4, 64).transpose(1, 2).reshape(4 * quads, columns // 32, 4, 2, 4)
    pairs = rows.transpose(3, 4).reshape(4 * quads, columns // 32, 4, 4, 2)
    return pairs.transpose(2, 3).reshape(4 * quads, columns)


@cache
def _marlin_order() -> Tensor:
    """Where each of the 1024 codes of a Marlin tile, input by input of 16 x 64, is stored.

    Source: ``_get_perms`` of IST-DASLab/marlin, as in auto-gptq 0.7.1 ``qlinear_marlin.py``: the fragment that each of 32
    threads of a tensor-core instruction holds, four 16 x 16 blocks beside each other, then eight codes interleaved.
    """
    order = []
    for thread in range(32):
        column, first = thread // 4, 2 * (thread % 4)
        fragment = [16 * row + column + 8 * half for half in (0, 1) for row in (first, first + 1, first + 8, first + 9)]
        order += [code + 256 * block for block in range(4) for code in fragment]
    stored = torch.tensor(order).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    return torch.argsort(stored)


def unpack_marlin(words: Tensor) -> Tensor:
    """Marlin: ``int32 [in / 16, out * 2]`` to ``uint8 [in, out]`` 4-bit codes."""
    tiles, width = words.shape
    nibbles = unpack_stream(as_bytes(words), 4, 8 * width)
    blocks = nibbles.view(-1, 1024)[:, _marlin_order().to(words.device)]
    return blocks.view(tiles, width // 32, 16, 16).transpose(1, 2).reshape(16 * tiles, width // 2)


def unpermute_marlin_scales(scales: Tensor) -> Tensor:
    """Marlin's ``[groups, out]`` scales in output order; one group a row has an order of its own."""
    if len(scales) > 1:
        order = [row + 8 * column for row in range(8) for column in range(8)]
    else:
        order = [2 * row + column for row in range(4) for column in (0, 1, 8, 9, 16, 17, 24, 25)]
    inverse = torch.argsort(torch.tensor(order, device=scales.device))
    return scales.reshape(-1, len(order))[:, inverse].reshape(scales.shape)


def unpack_words(words: Tensor, bits: int, count: int, across: bool) -> Tensor:
    """``int32 [rows, words]`` of compressed-tensors to ``uint8 [rows, count]`` codes.

    ``across``: one continuous stream a row, as compressed-tensors writes since 0.18. Before, no code crossed the end of
    a word and the top bits were left unused where ``bits`` does not divide 32.
    """
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8)
    if across:
        return unpack_stream(octets.reshape(rows, -1), bits, count)
    return unpack_stream(octets.reshape(-1, 4), bits, 32 // bits).reshape(rows, -1)[:, :count].contiguous()


def swap_nibbles(packed: Tensor) -> Tensor:
    """``uint8`` with the first of two 4-bit codes in the high nibble (bitsandbytes) to the low one, or back."""
    return packed >> 4 | packed << 4


def unpack_bitmask(compressed: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """compressed-tensors' ``sparse-24-bitmask``: the values that are not zero, in row order, and a bit for every place, least
    significant first. The result has the dtype of ``compressed``."""
    places = unpack_stream(bitmask, 1, shape[1]).bool()
    # Not every dtype of 8 bits can be scattered; bytes can.
    values = compressed.contiguous().view(-1).view(torch.uint8).view(-1, compressed.itemsize)
    dense = values.new_zeros(*shape, compressed.itemsize)
    dense[places] = values
    return dense.view(compressed.dtype).squeeze(-1)
