"""Every quantized format, one layer at a time: ``W [out, in]`` to the tensors of a file and the weight that they stand for.

Independent of :mod:`quant`: each format is written here from its description, or by the other writers of these tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.awq_writer import quantize as awq
from tests.gptq_writer import quantize as gptq
from tests.packers import pack_rows

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Written = tuple[dict[str, Tensor], Tensor]
"""The tensors of a layer by local name, and the weight that they stand for."""


def bytes_of(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def nearest(table: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest entry of a table."""
    return (values[..., None] - table).abs().argmin(-1)


def fp8_block(weight: Tensor, size: int = 32) -> Written:
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // size), -(-columns // size))
    codes, values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            values[place] = codes[place].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, values


def fp8_row(weight: Tensor) -> Written:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_static(weight: Tensor) -> Written:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": scale.new_tensor(0.01)}, codes.float() * scale


def int8_row(weight: Tensor) -> Written:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes * scale


def llm_int8(weight: Tensor) -> Written:
    tensors, _ = int8_row(weight)
    scb = tensors["weight_scale"][:, 0] * 127
    return {"weight": tensors["weight"], "SCB": scb}, tensors["weight"] * (scb / 127)[:, None]


def bnb4(weight: Tensor, kind: str) -> Written:
    """Double quantization for NF4, none for FP4. The values of the tables do not matter, they are stored."""
    table = torch.linspace(-1, 1, 16)
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    tensors = {"weight.quant_map": table}
    if kind == "nf4":
        second, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        top = (absmax - offset).abs().max().reshape(1)
        codes = nearest(second, (absmax - offset) / top)
        absmax = second[codes] * top + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            "weight.absmax": codes.to(torch.uint8),
            "weight.nested_absmax": top,
            "weight.nested_quant_map": second,
        }
    else:
        tensors["weight.absmax"] = absmax
    codes = nearest(table, blocks / absmax[:, None])
    flat = codes.flatten()
    tensors["weight"] = (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = bytes_of(state)
    return tensors, (table[codes] * absmax[:, None]).reshape(weight.shape)


def packed4(weight: Tensor) -> Written:
    grouped = weight.unflatten(1, (-1, 32))
    scale = grouped.abs().amax(2) / 7
    codes = (grouped / scale[..., None]).round().clamp(-8, 7)
    words = pack_rows((codes.flatten(1) + 8).numpy().astype(np.int64), 4)
    tensors = {"weight_packed": torch.from_numpy(words), "weight_scale": scale}
    return tensors | {"weight_shape": torch.tensor(weight.shape)}, (codes * scale[..., None]).flatten(1)


def e2m1_bytes(grouped: Tensor, step: Tensor) -> Written:
    codes = nearest(E2M1, grouped / step[..., None])
    flat = codes.flatten(-2)
    return {"codes": (flat[..., 0::2] | flat[..., 1::2] << 4).to(torch.uint8)}, (E2M1[codes] * step[..., None]).flatten(
        -2
    )


def powers(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Power-of-two steps of blocks, and their bytes."""
    exponent = grouped.abs().amax(-1).log2().floor() - 2
    return exponent.exp2(), (exponent + 127).to(torch.uint8)


def mxfp4(weight: Tensor) -> Written:
    grouped = weight.unflatten(-1, (-1, 32))
    step, stored = powers(grouped)
    codes, values = e2m1_bytes(grouped, step)
    return {"weight_packed": codes["codes"], "weight_scale": stored}, values


def nvfp4(weight: Tensor) -> Written:
    grouped = weight.unflatten(1, (-1, 16))
    factor = weight.abs().max().reshape(1) / (448 * 6)
    local = (grouped.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
    codes, values = e2m1_bytes(grouped, local.float() * factor)
    tensors = {"weight_packed": codes["codes"], "weight_scale": local, "weight_global_scale": 1 / factor}
    return tensors | {"input_global_scale": torch.tensor([500.0])}, values


def modelopt_nvfp4(weight: Tensor) -> Written:
    tensors, values = nvfp4(weight)
    factor = 1 / tensors["weight_global_scale"]
    renamed = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"]}
    return renamed | {"weight_scale_2": factor[0], "input_scale": torch.tensor(0.002)}, values


@dataclass(frozen=True)
class Family:
    """``title``: for people. ``inputs``: quantized by the format wherever it runs."""

    title: str
    quantize: Callable[[Tensor], Written]
    config: dict[str, Any] = field(default_factory=dict)
    inputs: bool = False


def compressed(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "version": "0.20.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
    }


AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FLOAT4 = {"num_bits": 4, "type": "float"}
NV = FLOAT4 | {"strategy": "tensor_group", "group_size": 16}
MX = FLOAT4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
CHANNEL8 = {"num_bits": 8, "strategy": "channel"}
TOKEN8 = {"num_bits": 8, "strategy": "token", "dynamic": True}
FAMILIES = {
    "awq": Family("AWQ gemm", lambda w: awq(w, 32), AWQ | {"quant_method": "awq", "modules_to_not_convert": ["gate"]}),
    "gptq-act-order": Family(
        "GPTQ act-order",
        lambda w: gptq(w, 4, 32, True),
        {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": 4,
            "group_size": 32,
            "desc_act": True,
            "sym": False,
        },
    ),
    "auto-round": Family(
        "AutoRound",
        lambda w: awq(w, 32),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_awq",
            "bits": 4,
            "group_size": 32,
            "sym": False,
        },
    ),
    "fp8-block": Family(
        "FP8 in blocks",
        fp8_block,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    ),
    "fp8-static": Family("FP8 static", fp8_static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-row": Family("FP8 a row", fp8_row, {"quant_method": "fbgemm_fp8"}),
    "bnb-nf4": Family(
        "NF4 (double)",
        lambda w: bnb4(w, "nf4"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bnb-fp4": Family(
        "FP4",
        lambda w: bnb4(w, "fp4"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
    "bnb-int8": Family(
        "LLM.int8", llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}, True
    ),
    "ct-int4": Family(
        "compressed-tensors pack",
        packed4,
        compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ),
    "ct-w8a8": Family("W8A8 int8", int8_row, compressed("int-quantized", CHANNEL8, TOKEN8), True),
    "ct-fp8": Family(
        "W8A8 FP8",
        fp8_row,
        compressed("float-quantized", CHANNEL8 | {"type": "float"}, TOKEN8 | {"type": "float"}),
        True,
    ),
    "ct-nvfp4": Family("NVFP4", nvfp4, compressed("nvfp4-pack-quantized", NV, NV | {"dynamic": "local"}), True),
    "ct-mxfp4": Family("MXFP4", mxfp4, compressed("mxfp4-pack-quantized", MX)),
    "modelopt-fp8": Family(
        "modelopt FP8", fp8_static, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, True
    ),
    "modelopt-nvfp4": Family(
        "modelopt NVFP4",
        modelopt_nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        True,
    ),
}
