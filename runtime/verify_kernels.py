"""Each kind of layer of a checkpoint, with the checkpoint's own weights: the chosen kernel against float64.

The truth of an output ``y = sum_i x_i w_i + b`` is computed in float64 from :func:`quant.reference.dequantize`, after the
quantization of inputs that the scheme asks for. Two bounds hold for a kernel that is right, in terms of the unit roundoff ``u``
of the dtype of ``x`` and of ``v = 2**-24``, that of the float32 in which every kernel sums up:

* one value, worst case: ``(2u + n v C) S + 2 n v Z + u |y|``, with ``S = sum |x_i w_i|``. A weight may be rounded twice on its
  way to the dtype of ``x``, ``n`` products are summed, the result is rounded once (Higham, *Accuracy and Stability*, section
  3.1). ``Z = sum |x_i z_i|``, where ``z`` is what the code 0 of an integer means: a kernel that sums products of codes and
  subtracts the zero point afterwards has partial sums of that size though ``w`` is zero;
* root mean square over an input: ``(u + sqrt(n) v C) (Q + |y|)``, with ``Q**2 = sum (x_i w_i)**2``. Roundings are as often up
  as down, so that their squares add up. This is the tighter one: a wrong scale or order cannot hide below it.

``C = 16``: partial sums of codes are up to so many times as large as those of weights. Beside them the smallest steps of the
dtype, where numbers are near its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activation import quantize_dequantize
from quant.base import LinearKernel, QuantWeight
from quant.reference import dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 7, 33, 129)
EXTREME_ROWS = (1, 7)
CANCELLING = 16.0
FLOAT32_ROUNDOFF = 2.0**-24
OUTLIER = 1000.0
"""How much larger one input is than the others: what the massive activations of language models come to."""
HEADROOM = 64.0
"""Between the largest number of a dtype and the largest sum that "large" inputs can give, with partial sums in between."""
CHUNK = 1 << 22
"""Weights that are held in float64 at a time."""


@dataclass(frozen=True)
class Reach:
    """How far a kernel is from the truth on one input, as a share of the two bounds: above 1 it is wrong."""

    dtype: torch.dtype
    inputs: str
    rows: int
    worst: float
    rms: float

    @property
    def share(self) -> float:
        return max(self.worst, self.rms)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.share:.2g} of the bound ({self.inputs} inputs, {self.rows} rows, {dtype})"


def examine(kernel: LinearKernel, weight: QuantWeight, bias: Tensor | None) -> Iterator[Reach]:
    """The kernel's reach for every dtype, kind of inputs and number of rows; ``weight`` is canonical.

    A result that is NaN, of another shape or of another dtype than the inputs is infinitely far.
    """
    dense = dequantize(weight)
    offsets = _offsets(weight)
    prepared = kernel.prepare(weight)
    whole = weight.scheme.activation is not None and weight.scheme.activation.whole  # rows are no longer by themselves
    for dtype in DTYPES:
        b = None if bias is None else bias.to(dtype)
        inputs = _inputs(dense, dtype)
        truths = _truth(torch.cat(list(inputs.values())), weight, dense, offsets, b).split(
            [len(x) for x in inputs.values()]
        )
        for (name, x), truth in zip(inputs.items(), truths, strict=True):
            for rows in ROWS if name == "random" else EXTREME_ROWS:
                y = kernel.apply(x[:rows], prepared, b)
                together = _truth(x[:rows], weight, dense, offsets, b) if whole else truth
                yield Reach(dtype, name, rows, *_shares(y, dtype, together, rows))


def _offsets(weight: QuantWeight) -> Tensor | None:
    """``|z| [out, in]``, what the code 0 means; ``None`` for floats, which have no zero point."""
    return dequantize(replace(weight, q=torch.zeros_like(weight.q))).abs() if weight.scheme.kind.is_integer else None


def _inputs(dense: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs by name, ``[rows, in]`` each, the same in every run."""
    count, limits = dense.shape[1], torch.finfo(dtype)
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(max(ROWS), count, generator=generator).to(dense.device)
    few = x[: max(EXTREME_ROWS)]
    outlier = few.clone()
    outlier[:, count // 3] *= OUTLIER
    largest = min(limits.max, 1e30) / HEADROOM
    sums = max(1.0, (few.abs() @ dense.abs().T).max().item(), few.abs().max().item())
    named = {
        "random": x,
        "large": few * (largest / sums),
        "tiny": few * (limits.smallest_normal**0.5),
        "zero": torch.zeros_like(few),
        "outlier": outlier if dtype != torch.float16 or sums * OUTLIER < largest else outlier / OUTLIER,
    }
    return {name: value.to(dtype) for name, value in named.items()}


@dataclass(frozen=True)
class _Truth:
    """``y``, ``S``, ``Z`` and ``Q`` as the module's docstring has them, ``floor`` the share of the smallest numbers, all
    ``[rows, out]``; ``count`` inputs."""

    y: Tensor
    total: Tensor
    shifted: Tensor
    spread: Tensor
    floor: Tensor
    count: int

    def split(self, sizes: list[int]) -> Iterator[_Truth]:
        """So many rows each, in their order."""
        whole = (self.y, self.total, self.shifted, self.spread, self.floor)
        for y, total, shifted, spread, floor in zip(*(tensor.split(sizes) for tensor in whole), strict=True):
            yield _Truth(y, total, shifted, spread, floor, self.count)


def _truth(x: Tensor, weight: QuantWeight, dense: Tensor, offsets: Tensor | None, bias: Tensor | None) -> _Truth:
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    activation = weight.scheme.activation
    if activation is not None:
        x = quantize_dequantize(x, activation, weight.input_scale, weight.input_zero)
    x = x.double()
    size = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (x / size).float()  # bounds need no more than float32, but its range
    parts = []
    for w in dense.split(max(1, CHUNK // dense.shape[1])):
        parts.append((x @ w.double().T, unit.abs() @ w.abs().T, unit.square() @ w.square().T))
    y, total, squares = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    total, spread = total.double() * size, squares.sqrt().double() * size
    shifted = torch.zeros_like(total) if offsets is None else (unit.abs() @ offsets.T).double() * size
    if bias is not None:
        y, total = y + bias.double(), total + bias.double().abs()
    floor = smallest * (2 + x.abs().sum(-1, keepdim=True))
    return _Truth(y, total, shifted, spread, floor, dense.shape[1])


def _shares(y: Tensor, dtype: torch.dtype, truth: _Truth, rows: int) -> tuple[float, float]:
    """The largest share of the worst-case bound, and that of the root mean square."""
    exact, total = truth.y[:rows], truth.total[:rows]
    if y.dtype != dtype or y.shape != exact.shape or not bool(torch.isfinite(y).all()):
        return torch.inf, torch.inf
    u, n = torch.finfo(dtype).eps / 2, truth.count
    error, floor = (y.double() - exact).abs(), truth.floor[:rows]
    worst = (2 * u + n * FLOAT32_ROUNDOFF * CANCELLING) * total + u * exact.abs() + floor
    worst += 2 * n * FLOAT32_ROUNDOFF * truth.shifted[:rows]
    likely = (u + n**0.5 * FLOAT32_ROUNDOFF * CANCELLING) * (truth.spread[:rows] + exact.abs()) + floor
    return (error / worst).max().item(), (error.square().mean() / likely.square().mean()).sqrt().item()


def most_distant(reaches: Iterator[Reach]) -> Mapping[torch.dtype, Reach]:
    """The one farthest from the truth, by dtype."""
    found: dict[torch.dtype, Reach] = {}
    for reach in reaches:
        if reach.dtype not in found or reach.share > found[reach.dtype].share:
            found[reach.dtype] = reach
    return found
