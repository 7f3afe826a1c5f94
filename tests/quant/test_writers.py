"""What writers compute beside what their files say: the reasons for the wider tolerances of :mod:`tests.formats`.

Each test does what the writing library does, on our own decoded codes and scales, and gets its logits; so what is left in
``test_formats`` is the library's arithmetic, not ours. Where torch multiplies as it did for the writers, the differences that
:data:`NOISE` bounds are nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from quant.base import QuantWeight
from quant.linear import QuantLinear
from quant.packing import unpack_stream
from quant.reference import dequantize, linear
from runtime import load_model
from tests.formats import CHECKPOINTS

Multiply = Callable[[Tensor, QuantWeight, Tensor | None], Tensor]

NOISE = {"max": 0.1, "mean": 0.01}
"""Of bfloat16 arithmetic on another CPU, as in :mod:`tests.formats`."""


def load(name: str, dtype: str, multiply: Multiply | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A checkpoint whose quantized layers compute ``multiply``, and what its writer computed."""
    model = load_model(CHECKPOINTS / name, dtype=dtype, kernel="reference")
    for layer in quantized(model) if multiply else ():
        layer.forward = bound(multiply, layer)  # type: ignore[method-assign,arg-type]
    return model, load_file(CHECKPOINTS / name / "reference.safetensors")


def bound(multiply: Multiply, layer: QuantLinear) -> Callable[[Tensor], Tensor]:
    assert layer.quant_weight is not None
    weight = layer.quant_weight
    return lambda x: multiply(x, weight, layer.bias)


def quantized(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@torch.inference_mode()
def difference(model: nn.Module, reference: dict[str, Tensor], **arguments: object) -> tuple[float, float]:
    """Largest and mean."""
    found = (model(reference["input_ids"], **arguments).logits.float() - reference["logits"].float()).abs()
    return found.max().item(), found.mean().item()


@pytest.mark.parametrize("name", ["w3g32-asym", "w4g32-desc", "w4g32-desc-static"])
def test_auto_gptq_ran_with_rotary_frequencies_in_float16(name: str) -> None:
    """``model.half()`` rounds every buffer, and the ``float()`` before its forward does not bring the bits back. That was all
    of the difference."""
    model, reference = load(f"auto-gptq--{name}", "float32")
    largest, _ = difference(model, reference)
    rotary = model.get_submodule("model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq.half().float()
    explained, mean = difference(model, reference)
    assert explained < 2e-5 < largest
    assert mean < 2e-6


# bitsandbytes


def bitsandbytes_4bit(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """Its CPU kernel: what the codes mean and absmax in bfloat16, products and sums in float32, the bias added to the sum
    after it was rounded (bitsandbytes 0.50.2 ``functional.py`` ``_convert_weight_packed_for_cpu``, ``autograd/_functions.py``
    ``matmul_4bit``)."""
    assert weight.table is not None
    codes = unpack_stream(weight.q, 4, weight.shape.in_features)
    absmax = weight.scale.bfloat16().float().repeat_interleave(weight.scheme.group, 1)
    values = weight.table.bfloat16().float()[codes.int()] * absmax
    y = F.linear(x.float(), values).to(x.dtype)
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", ["fp4", "nf4-storage-bf16"])
def test_bitsandbytes_rounds_absmax_and_the_table_on_a_cpu(name: str) -> None:
    """What remains are sums in another order, a unit of bfloat16 here and there."""
    ours, theirs = (difference(*load(f"bitsandbytes--{name}", "bfloat16", how)) for how in (None, bitsandbytes_4bit))
    assert theirs[0] < 0.05
    assert theirs[1] < 0.005 < ours[1] / 2


def llm_int8(x: Tensor, weight: QuantWeight, bias: Tensor | None) -> Tensor:
    """bitsandbytes 0.50.2 ``backends/default/ops.py``, step by step: outliers take their whole column out of the batch."""
    a, codes = x.reshape(-1, x.shape[-1]), (weight.q.to(torch.int16) - 128).float()
    absmax = (weight.scale * 127).flatten()
    halves = a.half()
    outliers = halves.abs() >= 6.0
    columns = outliers.any(0)
    halves = halves.masked_fill(outliers, 0)
    rows = halves.abs().amax(1, keepdim=True).float()
    quantized_rows = (halves * (127.0 / rows)).round()
    quantized_rows[:, columns] = 0
    y = quantized_rows @ codes.T * (rows * absmax) * 6.200124e-05
    y = (y if bias is None else y + bias).to(x.dtype)
    if columns.any():
        apart = (codes[:, columns] * absmax[:, None] * 7.874015718698502e-3).to(x.dtype)
        y = y.addmm(a[:, columns], apart.T)
    return y.view(*x.shape[:-1], -1)


def test_llm_int8_takes_outlier_columns_out_of_the_batch() -> None:
    largest, mean = difference(*load("bitsandbytes--int8", "bfloat16", llm_int8))
    assert largest < NOISE["max"]
    assert mean < NOISE["mean"]


def test_llm_int8_here_is_what_bitsandbytes_computes_of_each_token_alone() -> None:
    model, _ = load("bitsandbytes--int8", "bfloat16")
    for layer in quantized(model):
        assert layer.quant_weight is not None
        x = (torch.randn(6, layer.in_features) * 2).bfloat16().float()  # exact in float16, to which bitsandbytes rounds
        x[1, 3], x[2, 5:7], x[4, 3] = 9.0, -30.0, 6.0
        alone = torch.cat([llm_int8(token[None], layer.quant_weight, layer.bias) for token in x])
        together = llm_int8(x, layer.quant_weight, layer.bias)
        found = linear(x, layer.quant_weight, layer.bias)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())
        assert (found - together).abs().max() > 1e-3, "no token had an outlier that another had not"


# modelopt


class MultipliedCache(DynamicCache):
    """Keys and values in FP8 as modelopt simulates them: times the reciprocal of a scale, and divided by it."""

    def __init__(self, scales: dict[str, Tensor], config: object) -> None:
        super().__init__(config=config)  # type: ignore[arg-type]
        self.scales = scales

    def update(self, key: Tensor, value: Tensor, layer: int, *rest: object, **options: object) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rounded = []
        for tensor, letter in ((key, "k"), (value, "v")):
            factor = 1 / self.scales[f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"].float()
            codes = (tensor.float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
            rounded.append((codes.float() / factor).to(tensor.dtype))
        return super().update(*rounded, layer, *rest, **options)  # type: ignore[arg-type]


def before_export(layer: QuantLinear, moved: Tensor) -> None:
    """Put the codes back that modelopt computed its logits with. It rounds weights in float32, and once more in bfloat16 when
    it exports: 3 % of the codes, ties mostly, went to their neighbour. ``moved`` is their places, counted from 1 in row
    order, negative where the code was one less."""
    assert layer.quant_weight is not None
    codes, places = layer.quant_weight.q.view(torch.uint8).view(-1), moved.abs().long() - 1
    codes[places] += moved.sign().to(torch.uint8)


def test_modelopt_computed_with_weights_that_it_did_not_export_and_a_quantized_cache() -> None:
    model, reference = load("modelopt--fp8-kv", "bfloat16")
    folder: Path = CHECKPOINTS / "modelopt--fp8-kv"
    as_exported = difference(model, reference)
    moved = load_file(folder / "before_export.safetensors")
    for layer in quantized(model):
        before_export(layer, moved[layer.name])
        name = f"dequant.{layer.name}"
        if name in reference:
            assert layer.quant_weight is not None
            assert torch.equal(dequantize(layer.quant_weight).to(reference[name].dtype), reference[name])
    cache = MultipliedCache(load_file(folder / "model.safetensors"), model.config)
    largest, mean = difference(model, reference, past_key_values=cache)
    assert largest < NOISE["max"]
    assert mean < NOISE["mean"] < as_exported[1] / 5
