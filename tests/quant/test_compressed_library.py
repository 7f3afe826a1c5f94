"""compressed-tensors against the library itself, where it is installed: every number format, strategy and odd size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.activation import quantize_dequantize
from quant.base import LinearShape, UnsupportedCheckpoint
from quant.compressed_config import CompressedConfig
from quant.methods.compressed import CompressedTensors
from quant.reference import dequantize
from tests.quant.checkpoints import headers_of, read

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}


def scales(weight: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """Scale and zero point of every block, found the plain way."""
    rows, columns = weight.shape
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(args.block_structure or ()),
    }.get(str(args.strategy), (1, args.group_size))
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2).flatten(2)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = 448 * 6 / weight.abs().max().float().reshape(1)
    scale, zero = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), args, global_scale=found.get("weight_global_scale")
    )
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return found | {"weight_scale": scale, "weight_zero_point": zero}


def written(fmt: str, shape: LinearShape, **weights: Any) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Configuration, tensors and dequantized weight of a layer ``a`` from the library's own compressor."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    assert scheme.weights is not None
    weight = torch.randn(shape.out_features, shape.in_features) + torch.randn(shape.out_features, 1) / 2
    compressor = BaseCompressor.get_value_from_registry(fmt)
    state = compressor.compress({"weight": weight, **scales(weight, scheme.weights)}, scheme)
    values = compressor.decompress(state, scheme)["weight"].float()
    entry = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "format": fmt, "version": "0.20.0", "config_groups": {"g": entry}}
    return config, {f"a.{name}": tensor for name, tensor in state.items()}, values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("shape", "strategy"),
    [
        (LinearShape(96, 40), {"strategy": "group", "group_size": 32}),
        (LinearShape(20, 11), {"strategy": "channel"}),
        (LinearShape(10, 3), {"strategy": "channel"}),
    ],
    ids=str,
)
def test_packed_integers(shape: LinearShape, strategy: dict[str, Any], bits: int, symmetric: bool) -> None:
    config, tensors, values = written("pack-quantized", shape, num_bits=bits, symmetric=symmetric, **strategy)
    method = CompressedTensors.from_checkpoint(config, headers_of(tensors))
    assert method is not None
    torch.testing.assert_close(dequantize(read(method, tensors, "a", shape)), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "weights"),
    [
        ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
        ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 128]}),
        ("mxfp8-quantized", MX | {"num_bits": 8}),
        ("mxfp4-pack-quantized", MX | {"num_bits": 4}),
        ("nvfp4-pack-quantized", NVFP4),
    ],
    ids=str,
)
def test_one_number_an_element_and_packed_floats(fmt: str, weights: dict[str, Any]) -> None:
    shape = LinearShape(192, 72)
    config, tensors, values = written(fmt, shape, **weights)
    method = CompressedTensors.from_checkpoint(config, headers_of(tensors))
    assert method is not None
    # The library gives NVFP4 back in bfloat16.
    exact = 2**-7 if fmt.startswith("nvfp4") else 2**-22
    torch.testing.assert_close(dequantize(read(method, tensors, "a", shape)), values, rtol=exact, atol=1e-6)


@pytest.mark.parametrize("name", PRESET_SCHEMES)
def test_schemes_by_name_are_those_of_the_library(name: str) -> None:
    """Each is read as it is when it is written out, or refused by name."""
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[name]).model_dump(mode="json")
    if name.startswith("MXFP6"):
        with pytest.raises(UnsupportedCheckpoint, match=f"{name}: weights of type 'float' with 6 bits"):
            CompressedConfig.read({"config_groups": {name: ["Linear"]}})
        return
    by_name, written_out = (CompressedConfig.read({"config_groups": {name: entry}}) for entry in (["Linear"], scheme))
    assert by_name == written_out
    assert len(by_name.groups) == (name != "UNQUANTIZED")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "args",
    [
        {"num_bits": 8, "strategy": "token", "dynamic": True},
        {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False},
        {"num_bits": 4, "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True},
        {"num_bits": 8, "strategy": "tensor", "dynamic": True, "symmetric": False},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        MX | {"num_bits": 4, "dynamic": True},
        MX | {"num_bits": 8, "dynamic": True},
        NVFP4 | {"dynamic": "local"},
    ],
    ids=str,
)
def test_quantized_inputs_are_those_of_the_library_bit_for_bit(args: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = QuantizationArgs(**args)
    entry = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": theirs.model_dump(mode="json"),
    }
    method = CompressedTensors.from_checkpoint(
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": entry}}, {}
    )
    assert method is not None
    how = method.config.groups[0].inputs
    assert how is not None
    x = (torch.randn(2, 5, 96) * torch.logspace(-2, 1, 5)[:, None]).to(dtype)
    x[0, 0, :32] = 0
    stored = 448 * 6 / x.abs().max().float().reshape(1) if theirs.dynamic == "local" else None
    if theirs.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, theirs, torch.nn.Module(), global_scale=stored)
        ours = quantize_dequantize(x, how, stored, None)
    else:
        scale, zero = calculate_qparams(x.min(), x.max(), theirs)
        ours = quantize_dequantize(x, how, scale, None if theirs.symmetric else zero)
    expected = fake_quantize(x.clone(), scale, zero, theirs, global_scale=stored)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected.to(dtype)), (ours.float() - expected.float()).abs().max()
