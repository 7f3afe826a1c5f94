"""Tile sizes, as data. A row of a table: the largest padded head dimension that a configuration is for, and the configuration.

``HOPPER`` is for compute capability 9.0. What is marked there was the best of those that spill nothing on an NVIDIA H100
80GB HBM3 with Triton 3.6 (``python -m benchmarks.attention_sweep``); int8 takes what is good for fp8. The other rows and
``SAFE`` were not measured, but chosen so that nothing spills. ``SAFE`` fits the 99 KiB of shared memory that every
architecture from 8.0 on has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attention.base import AttentionSpec
from attention.kernels.shape import padded, split_key_dim
from attention.kv_dtypes import LARGEST_CODE


class Config(NamedTuple):
    rows: int  # queries times query heads of a program
    keys: int  # of one tile
    warps: int
    stages: int
    programs: int = 0  # decode: that each multiprocessor should get


Table = dict[int, Config]

HOPPER = (9, 0)

DECODE_SAFE: Table = {
    64: Config(16, 64, 4, 2, 2),
    128: Config(16, 64, 4, 2, 2),
    256: Config(16, 16, 4, 2, 2),
    1024: Config(16, 16, 8, 2, 2),
}
DECODE_HOPPER: Table = {
    64: Config(16, 64, 4, 4, 2),
    128: Config(16, 64, 4, 3, 2),  # measured
    256: Config(16, 32, 4, 3, 2),
    1024: Config(16, 32, 4, 3, 2),  # measured with latents of 576
}
DECODE_HOPPER_QUANTIZED: Table = {
    64: Config(16, 128, 4, 2, 4),
    128: Config(16, 128, 4, 2, 4),  # measured
    192: Config(16, 32, 8, 2, 2),
    256: Config(16, 32, 4, 2, 2),
    1024: Config(16, 32, 8, 2, 2),
}
VARLEN_SAFE: Table = {
    64: Config(64, 32, 4, 2),
    128: Config(64, 32, 4, 2),
    256: Config(32, 32, 4, 2),
    1024: Config(16, 16, 4, 2),
}
VARLEN_HOPPER: Table = {  # measured, 192 with the keys that are made of latents, 1024 with latents of 576
    64: Config(128, 64, 4, 3),
    128: Config(128, 64, 8, 3),
    192: Config(128, 64, 8, 3),
    256: Config(128, 32, 8, 3),
    1024: Config(16, 32, 4, 2),
}
VARLEN_HOPPER_QUANTIZED: Table = {
    64: Config(128, 64, 8, 2),
    128: Config(128, 64, 8, 3),  # measured
    256: Config(64, 32, 8, 2),
    1024: Config(16, 16, 4, 2),
}
FLOAT32: Table = {64: Config(16, 32, 4, 2, 2), 1024: Config(16, 16, 8, 1, 2)}
"""Without tensor cores. For decode and varlen."""


def decode_config(spec: AttentionSpec, model: torch.dtype, cache: torch.dtype, capability: tuple[int, int]) -> Config:
    table = DECODE_SAFE
    if capability == HOPPER:
        table = DECODE_HOPPER_QUANTIZED if cache in LARGEST_CODE else DECODE_HOPPER
    return _look_up(table, spec, model, cache)


def varlen_config(spec: AttentionSpec, model: torch.dtype, cache: torch.dtype, capability: tuple[int, int]) -> Config:
    table = VARLEN_SAFE
    if capability == HOPPER:
        table = VARLEN_HOPPER_QUANTIZED if cache in LARGEST_CODE else VARLEN_HOPPER
    return _look_up(table, spec, model, cache)


def _look_up(table: Table, spec: AttentionSpec, model: torch.dtype, cache: torch.dtype) -> Config:
    dim = max(sum(split_key_dim(spec.key_dim)), padded(spec.value_dim))
    if torch.float32 in (model, cache):
        table = FLOAT32
    return next(config for largest, config in table.items() if dim <= largest)
