"""Every bit order in one place: integers of 2 to 8 bits in wider words.

The canonical order of this project, and of GPTQ, compressed-tensors and AWQ's later versions, is a continuous stream of
codes, least significant bit first. AWQ's ``gemm`` version interleaves the eight codes of a word instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column ``c`` of eight sits in bits ``4 * AWQ_NIBBLE_OF_COLUMN[c]`` of the word (AutoAWQ 0.2.9, ``gemm``)."""


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


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ ``gemm``: ``int32 [rows, columns / 8]`` to ``uint8 [rows, columns]`` 4-bit codes in column order."""
    rows, count = words.shape
    octets = words.contiguous().view(torch.uint8).reshape(rows, count, 4)
    nibbles = torch.stack([octets & 15, octets >> 4], dim=-1).reshape(rows, count, 8)
    return nibbles[:, :, AWQ_NIBBLE_OF_COLUMN].flatten(1)
