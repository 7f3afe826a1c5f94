"""FP8 weights and power-of-two scales as files hold them; shared by the formats that store them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.base import BadCheckpoint, TensorSpec, UnsupportedCheckpoint

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWER_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
"""One byte ``b`` that means ``2 ** (b - 127)``."""

OTHER_FLOAT8 = {
    torch.float8_e5m2: "E5M2",
    torch.float8_e4m3fnuz: "E4M3FNUZ",
    torch.float8_e5m2fnuz: "E5M2FNUZ",
}


def is_float8(headers: Mapping[str, TensorSpec], tensor: str) -> bool:
    """Whether a stored tensor is e4m3fn. Raises :class:`UnsupportedCheckpoint` for the other 8-bit floats, which no
    published language model uses for weights."""
    spec = headers.get(tensor)
    if spec is not None and spec.dtype in OTHER_FLOAT8:
        raise UnsupportedCheckpoint(
            f"{tensor} is stored as {OTHER_FLOAT8[spec.dtype]}; only E4M3 (e4m3fn) is supported for weights. "
            "Use a copy of the model in E4M3, or convert it with the tool that wrote it."
        )
    return spec is not None and spec.dtype == torch.float8_e4m3fn


def canonical_scale(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Stored scales in the shape of the canonical layout; bytes become the powers of two that they are."""
    if stored.dtype == torch.uint8:
        if bool((stored == 255).any()):
            raise BadCheckpoint(
                f"{int((stored == 255).sum())} of {stored.numel()} scales are the byte 255, which is not a power of two "
                "but NaN. The file is damaged."
            )
        stored = stored.contiguous().view(torch.float8_e8m0fnu)
    return stored.reshape(shape)


def single(stored: Tensor) -> Tensor:
    """A stored number, of whatever shape, as ``[1]``."""
    return stored.reshape(1)
