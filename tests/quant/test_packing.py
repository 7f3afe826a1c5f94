"""Bit orders against loops that move one bit at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from quant.packing import (
    AWQ_NIBBLE_OF_COLUMN,
    PLANES,
    as_bytes,
    pack_stream,
    transpose_awq,
    unpack_awq_fast,
    unpack_marlin,
    unpack_planar,
    unpack_stream,
)
from tests.packers import pack_awq_fast, pack_marlin, pack_rows

COUNTS = (1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100)


def packed_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << place for place, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_stream_is_packed_bit_by_bit_and_comes_back(bits: int, count: int) -> None:
    draw = random.Random(bits * 1000 + count)
    rows = [[draw.randrange(2**bits) for _ in range(count)] for _ in range(3)]
    codes = torch.tensor(rows, dtype=torch.uint8)

    packed = pack_stream(codes, bits)

    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_bit_by_bit(row, bits) for row in rows]
    assert unpack_stream(packed, bits, count).tolist() == rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_after_the_last_code_are_ignored(bits: int) -> None:
    packed = torch.full((2, 5), 255, dtype=torch.uint8)
    for count in range(1, 40 // bits + 1):
        assert unpack_stream(packed, bits, count).tolist() == [[2**bits - 1] * count] * 2


@pytest.mark.parametrize("rows", [1, 5, 8, 24])
@pytest.mark.parametrize("cached", [1, 40, 1 << 18])
def test_awq_words_are_interleaved(rows: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.packing.CACHED_WORDS", cached)
    draw = random.Random(0)
    words = [[draw.randrange(-(2**31), 2**31) for _ in range(3)] for _ in range(rows)]

    columns = [[word >> 4 * nibble & 15 for word in row for nibble in AWQ_NIBBLE_OF_COLUMN] for row in words]

    streams = transpose_awq(torch.tensor(words, dtype=torch.int32))
    assert unpack_stream(streams, 4, rows).t().tolist() == columns
    assert streams.shape == (24, -(-rows // 2))


def test_awq_columns_are_where_autoawq_puts_them() -> None:
    """AutoAWQ packs column ``order[i]`` into bits ``4 i`` with this order."""
    word = sum(column << 4 * place for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    assert transpose_awq(torch.tensor([[word]], dtype=torch.int32)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("bits", PLANES)
def test_planes(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96))
    packed = as_bytes(torch.from_numpy(pack_rows(codes, bits, planes=True)))
    assert unpack_planar(packed, bits, 96).tolist() == codes.tolist()


def test_awq_rows_are_interleaved_by_four() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (12, 192))
    assert unpack_awq_fast(torch.from_numpy(pack_awq_fast(codes))).tolist() == codes.tolist()


def test_marlin_tiles() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (48, 128))
    packed, _ = pack_marlin(codes, np.zeros((1, 128)))
    assert unpack_marlin(torch.from_numpy(packed)).tolist() == codes.tolist()
