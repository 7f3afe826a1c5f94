"""What launches know of the device."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl

from quant.kernels.gpu.unpack import interpreting


class Device(NamedTuple):
    processors: int
    capability: tuple[int, int]

    @property
    def early(self) -> bool:
        """Whether a launch may start while the one before it runs, and wait for its results (*programmatic dependent
        launch*). Every program has to wait, before it writes and before it ends: the next launch counts on it."""
        return self.capability >= (9, 0) and not interpreting() and torch.version.hip is None


@cache
def device_of(index: int | None) -> Device:
    """The CUDA device ``index``; ``None`` stands for the interpreter, which takes anything."""
    if index is None:
        return Device(4, (9, 0))
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What is multiplied; in the interpreter float32, since it multiplies bfloat16 as integers."""
    if interpreting():
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
