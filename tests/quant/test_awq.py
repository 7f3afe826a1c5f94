"""The AWQ format against files that AutoAWQ wrote and against a writer of our own."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant.base import BadCheckpoint, LinearShape, Scheme, TensorSpec, UnsupportedCheckpoint, WeightKind
from quant.methods.awq import AWQ
from quant.methods.awq_layouts import LAYOUTS
from quant.reference import dequantize
from tests.awq_writer import quantize

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
SHAPE = LinearShape(64, 24)
HEADERS = {
    "a.qweight": TensorSpec((64, 3), torch.int32),
    "a.qzeros": TensorSpec((2, 3), torch.int32),
    "a.scales": TensorSpec((2, 24), torch.float16),
}


def make(config: dict[str, Any] | None = None, headers: dict[str, TensorSpec] | None = None) -> AWQ:
    method = AWQ.from_checkpoint(CONFIG | (config or {}), HEADERS if headers is None else headers)
    assert method is not None
    return method


@pytest.mark.parametrize("name", ["autoawq--gemm-g128"])
def test_weights_are_those_that_autoawq_dequantizes(name: str) -> None:
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    reference = load_file(CHECKPOINTS / name / "reference.safetensors")
    headers = {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    group = int(name.rpartition("g")[2])
    method = make({"group_size": group}, headers)
    layer = "model.layers.0.self_attn.k_proj"
    shape = LinearShape(256, 128, bias=True)
    scheme = method.scheme_for(layer, shape)
    assert scheme is not None
    assert scheme.kind is WeightKind.INT4
    assert scheme.group == group
    specs = method.tensors(layer, shape)
    assert all(headers[f"{layer}.{local}"] == spec for local, spec in specs.items())
    weight = method.repack({local: tensors[f"{layer}.{local}"] for local in specs}, scheme, shape)
    # The writer multiplies in float16; ours is exact before it is rounded to the same type.
    torch.testing.assert_close(dequantize(weight).half(), reference[f"dequant.{layer}"], rtol=2**-10, atol=1e-7)


def test_codes_and_zeros_are_exact_to_the_bit() -> None:
    original = torch.randn(24, 64)
    tensors, values = quantize(original, 32)
    method = make()
    scheme = method.scheme_for("a", SHAPE)
    assert scheme is not None
    weight = method.repack(tensors, scheme, SHAPE)
    assert torch.equal(dequantize(weight), values)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert all(torch.equal(tensors[name], before[name]) for name in tensors), "repack changed its input"


def test_another_method_is_not_ours() -> None:
    assert AWQ.from_checkpoint({"quant_method": "gptq"}, HEADERS) is None


def test_a_layer_without_qweight_is_dense_and_says_why() -> None:
    method = make({"modules_to_not_convert": ["lm_head"]})
    assert method.scheme_for("lm_head", SHAPE) is None
    assert "modules_to_not_convert" in method.dense_reason("lm_head")
    assert "no qweight" in method.dense_reason("other")


def test_one_group_a_row() -> None:
    scheme = make({"group_size": -1}).scheme_for("a", SHAPE)
    assert scheme is not None
    assert scheme.block == (1, 64)


def test_symmetric_without_zeros_means_eight() -> None:
    headers = {name: spec for name, spec in HEADERS.items() if name != "a.qzeros"}
    method = make({"zero_point": False}, headers)
    scheme = method.scheme_for("a", SHAPE)
    assert scheme is not None
    assert not scheme.zero_point
    assert "qzeros" not in method.tensors("a", SHAPE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 3, "version": "gemv"}, "AWQ gemv with 3 bits.*only 4"),
        ({"bits": 1}, r"1 bits.*only 2 to 8"),
        ({"bits": "q4"}, "'q4' bits"),
    ],
)
def test_unsupported_variants_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        make(config)


@pytest.mark.parametrize("size", [0, -2, "128", None])
def test_a_group_size_that_cannot_be(size: object) -> None:
    with pytest.raises(BadCheckpoint, match="group_size"):
        make({"group_size": size})


def test_contradictions_name_module_and_entry() -> None:
    without = lambda *names: {k: v for k, v in HEADERS.items() if k not in names}  # noqa: E731
    cases = [
        (make(headers=without("a.qzeros")), "a: qzeros is missing.*zero_point: true"),
        (make(headers=without("a.qweight")), "a: scales is there but qweight is missing"),
        (
            make(headers=HEADERS | {"a.weight": TensorSpec((24, 64), torch.float16)}),
            "a: both qweight and a dense weight",
        ),
        (make({"modules_to_not_convert": ["a"]}), "a: qweight is stored, but modules_to_not_convert lists 'a'"),
        (make({"group_size": 48}), "a: group 48 does not divide 64 inputs.*group_size"),
    ]
    for method, message in cases:
        with pytest.raises(BadCheckpoint, match=message):
            method.scheme_for("a", SHAPE)


def test_another_version_is_named_where_the_shape_of_the_codes_does_not_tell() -> None:
    """gemm and gemv store the codes of a square layer in one shape, their scales not."""
    square, scheme = LinearShape(64, 64), Scheme(WeightKind.INT4, (1, 32), zero_point=True)
    for stored, said in product(("gemm", "gemv"), repeat=2):
        specs = LAYOUTS[stored].specs(scheme, square, torch.float16)
        method = make({"version": said}, {f"a.{local}": spec for local, spec in specs.items()})
        if stored == said:
            assert method.scheme_for("a", square) == scheme
            continue
        with pytest.raises(
            BadCheckpoint, match=rf"version {stored} with 4 bits .* says {said} with 4\. Correct version"
        ):
            method.scheme_for("a", square)


def test_a_loosely_matching_skip_entry_explains_and_contradicts_nothing() -> None:
    """AutoAWQ means any substring: ``gate`` explains a dense ``gate_up``, but does not contradict a quantized one."""
    method = make({"modules_to_not_convert": ["gate"]}, {f"gate_proj.{n[2:]}": spec for n, spec in HEADERS.items()})
    assert "'gate'" in method.dense_reason("mlp.gate")
    assert "'gate'" in method.dense_reason("mlp.gate_up")
    assert method.scheme_for("gate_proj", SHAPE) is not None


def test_a_skip_list_that_is_none() -> None:
    with pytest.raises(BadCheckpoint, match="modules_to_not_convert must be a list of module names, not 5"):
        make({"modules_to_not_convert": 5})


def test_entries_that_name_nothing_are_told() -> None:
    method = make({"modules_to_not_convert": ["lm_head", "visual"]})
    assert method.unmatched(["a", "lm_head"]) == ["modules_to_not_convert: visual"]


def test_scaled_activations_are_refused_by_name() -> None:
    headers = HEADERS | {"mlp.act.scales": TensorSpec((64,), torch.float16)}
    with pytest.raises(UnsupportedCheckpoint, match=r"mlp\.act\.scales.*ScaledActivation"):
        make(headers=headers)
