"""What the round trips share: bounds on their number, and the comparison.

The weight that a layer stands for is computed one number at a time, from the formats' descriptions, and written by packers in
plain loops (:mod:`tests.packers`); nothing of :mod:`quant` has a part in it. Examples are derived from the test itself, so
every run sees the same ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from quant.base import LinearShape, QuantMethod, TensorSpec
from quant.reference import dequantize

bounded = settings(max_examples=150, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**32 - 1)
small = st.integers(1, 12)


def compressed(fmt: str, version: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": fmt, "version": version, "config_groups": {"g": group}}


def assert_read_back(
    method: type[QuantMethod],
    config: dict[str, Any],
    arrays: dict[str, np.ndarray | Tensor],
    weight: np.ndarray,
) -> None:
    """A layer ``a`` with these tensors dequantizes to ``weight [out, in]``, bit for bit. The reader has to expect exactly the
    stored shapes and dtypes, and to leave the tensors as they are."""
    tensors = {
        name: array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
        for name, array in arrays.items()
    }
    headers = {f"a.{name}": TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shape = LinearShape(weight.shape[1], weight.shape[0])
    reader = method.from_checkpoint(config, headers)
    assert reader is not None
    scheme = reader.scheme_for("a", shape)
    assert scheme is not None
    assert reader.tensors("a", shape) == {name: headers[f"a.{name}"] for name in tensors}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = dequantize(reader.repack(tensors, scheme, shape))
    assert all(torch.equal(_bytes(tensors[name]), _bytes(before[name])) for name in tensors)
    torch.testing.assert_close(found, torch.from_numpy(weight.astype(np.float32)), rtol=0, atol=0)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
