"""Packers of our own for GPTQ's and AWQ's arrangements: plain loops over Python integers, written from the formats'
descriptions and independent of :mod:`quant`. A packed row is one long integer, code ``k`` at bit ``k * bits``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def split(number: int, words: int, width: int) -> list[int]:
    """A long integer as signed words, the lowest first."""
    parts = [number >> width * k & (1 << width) - 1 for k in range(words)]
    return [part - (1 << width) if part >> width - 1 else part for part in parts]


def stream(codes: Sequence[int], bits: int) -> int:
    return sum(int(code) << bits * k for k, code in enumerate(codes))


def planar(codes: Sequence[int], bits: int) -> int:
    """32 codes at a time: the low plane of all of them, then the planes above."""
    number = 0
    for block in range(0, len(codes), 32):
        place, offset = block * bits, 0
        for width in PLANES.get(bits, (bits,)):
            for code in codes[block : block + 32]:
                number |= (int(code) >> offset & (1 << width) - 1) << place
                place += width
            offset += width
    return number


def pack_rows(codes: np.ndarray, bits: int, width: int = 32, planes: bool = False) -> np.ndarray:
    """``[rows, count]`` codes to ``[rows, words]`` of ``width`` bits."""
    words = -(-codes.shape[1] * bits // width)
    rows = [split((planar if planes else stream)(row, bits), words, width) for row in codes.tolist()]
    return np.array(rows, dtype=f"int{width}").reshape(len(codes), words)


def less_one_with_borrow(words: np.ndarray, bits: int) -> np.ndarray:
    """Every word less 0x1111..., as GPTQModel stores zero points of its first version."""
    width = 8 * words.itemsize
    ones = stream([1] * (width // bits), bits)
    flat = [split((int(word) - ones) % (1 << width), 1, width)[0] for word in words.flatten()]
    return np.array(flat, dtype=words.dtype).reshape(words.shape)


def pack_awq_gemm(codes: np.ndarray) -> np.ndarray:
    """``[rows, columns]`` of 4 bits: eight neighbouring columns a word, interleaved."""
    ordered = codes.reshape(len(codes), -1, 8)[:, :, AWQ_COLUMNS].reshape(codes.shape)
    return pack_rows(ordered, 4)


def pack_awq_fast(codes: np.ndarray) -> np.ndarray:
    """``[out, in]`` of 4 bits to ``int16 [out / 4, in]``, step by step as AutoAWQ's ``pack_intweight``."""
    outputs, inputs = codes.shape
    lanes = codes.reshape(outputs, inputs // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(outputs, inputs // 8, 4, 2)
    parted = lanes.transpose(0, 1, 3, 2).reshape(outputs, inputs)
    packed = np.zeros((outputs // 4, inputs), np.int64)
    for quad in range(outputs // 4):
        for block in range(inputs // 64):
            flat = [parted[4 * quad + row, 64 * block + k] for row in range(4) for k in range(64)]
            for k in range(64):
                packed[quad, 64 * block + k] = split(stream(flat[4 * k : 4 * k + 4], 4), 1, 16)[0]
    return packed.astype(np.int16)


def marlin_order() -> list[int]:
    """Which code of a 16 x 64 tile comes where (IST-DASLab/marlin, ``_get_perms``)."""
    order: list[int] = []
    for i in range(32):
        fragment = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1):
                fragment.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            order.extend(p + 256 * j for p in fragment)
    return [order[k // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[k % 8]] for k in range(1024)]


def pack_marlin(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[in, out]`` codes and ``[groups, out]`` scales to Marlin's."""
    inputs, outputs = codes.shape
    order, tiles = marlin_order(), np.zeros((inputs // 16, outputs * 16), np.int64)
    for k in range(inputs // 16):
        for n in range(outputs // 64):
            tile = [codes[16 * k + i, 64 * n + 16 * b + j] for b in range(4) for i in range(16) for j in range(16)]
            tiles[k, 1024 * n : 1024 * (n + 1)] = [tile[place] for place in order]
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    chosen = grouped if len(scales) > 1 else single
    return pack_rows(tiles, 4), scales.reshape(-1, len(chosen))[:, chosen].reshape(scales.shape)


def pack_apart(codes: np.ndarray, bits: int) -> np.ndarray:
    """``[rows, count]`` codes to int32 words with no code across the end of a word: compressed-tensors before 0.18."""
    each = 32 // bits
    starts = range(0, codes.shape[1], each)
    rows = [[split(stream(row[k : k + each], bits), 1, 32)[0] for k in starts] for row in codes.tolist()]
    return np.array(rows, np.int32).reshape(len(codes), len(starts))


def pack_nibbles(codes: Sequence[int], high_first: bool = False) -> np.ndarray:
    """Two codes a byte: the first in the low nibble, or, as bitsandbytes does, in the high one."""
    pairs = [codes[k : k + 2] for k in range(0, len(codes), 2)]
    shift = (4, 0) if high_first else (0, 4)
    return np.array([sum(int(c) << s for c, s in zip(pair, shift, strict=False)) for pair in pairs], np.uint8)


def pack_bitmask(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[rows, columns]``: the values that are not zero, row by row, and a bit for every place, least significant first."""
    kept = [[value for value in row if value] for row in dense.tolist()]
    masks = [split(stream([value != 0 for value in row], 1), -(-len(row) // 8), 8) for row in dense.tolist()]
    return np.array(kept), np.array(masks, np.int8).view(np.uint8)


def e2m1(code: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa (OCP Microscaling Formats 1.0)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if sign else size


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; all ones are NaN (OCP 8-bit Floating Point 1.0)."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if sign else size
