"""What formats that are read refuse, each by an example: the data behind ``test_refusals`` and README's rows of refusals.

Formats that are not read at all are those of :data:`quant.refused.REFUSED`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant import registry
from quant.base import LinearShape
from tests.quant.checkpoints import headers_of, read

SHAPE = LinearShape(64, 64)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}},
}
ONLINE = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"location": "input"}]}}}


@dataclass(frozen=True)
class Refusal:
    """``what`` of ``family`` is refused, told by a configuration and the tensors of a layer ``a``; ``message`` is what the
    owner of the checkpoint has to be told, as a regular expression."""

    family: str
    what: str
    config: dict[str, Any]
    message: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def provoke(self) -> None:
        """Open such a checkpoint and read the layer."""
        read(registry.resolve(self.config, headers_of(self.tensors)), self.tensors, "a", SHAPE)


def stored_as(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"a.weight": torch.zeros(64, 64).to(dtype), "a.weight_scale": torch.tensor(1.0)}


REFUSALS = [
    Refusal(
        "AWQ", "other versions", {"quant_method": "awq", "bits": 4, "version": "exllama"},
        "version 'exllama'.*only gemm, gemv, gemv_fast, llm-awq, marlin",
    ),
    Refusal(
        "AWQ", "`*.act.scales`", {"quant_method": "awq", "bits": 4, "group_size": 32}, r"act\.scales.*ScaledActivation",
        {"a.act.scales": torch.ones(64)},
    ),
    *(
        Refusal("GPTQ", name, GPTQ | {entry: name}, f"format '{name}'.*{why}")
        for name, entry, why in (
            ("bitblas", "checkpoint_format", "permuted for one kernel library"),
            ("qqq", "format", "8-bit activations"),
            ("exl3", "format", "trellis"),
            ("vptq", "format", "vector-quantized"),
            ("paroquant", "format", "rotated"),
        )
    ),
    Refusal("GPTQ", "rotation", GPTQ | {"rotation": "hadamard"}, "rotation is 'hadamard'.*without rotation"),
    Refusal("GPTQ", "adapters", GPTQ | {"adapter": {"name": "lora", "rank": 64}}, r"adapter is .*EoRA"),
    *(
        Refusal("FP8", name, FP8, rf"a\.weight is stored as {name}; only E4M3", stored_as(dtype))
        for name, dtype in (
            ("E5M2", torch.float8_e5m2),
            ("E4M3FNUZ", torch.float8_e4m3fnuz),
            ("E5M2FNUZ", torch.float8_e5m2fnuz),
        )
    ),
    Refusal(
        "FP8", "static inputs with blocks", FP8 | {"activation_scheme": "static", "weight_block_size": [128, 128]}, "static"
    ),
    Refusal(
        "modelopt", "W4A16_AWQ and other algorithms", {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "'W4A16_AWQ'.*known: FP8",
    ),
    *(
        Refusal(
            "compressed-tensors", name, COMPRESSED | {"format": name},
            rf"format '{name}' \(quantization_config: format\) .*known",
        )
        for name in ("marlin-24", "mxfp6-pack-quantized")
    ),
    Refusal(
        "compressed-tensors", "sparse-bitmask", COMPRESSED | {"sparsity_config": {"format": "sparse-bitmask"}},
        "'sparse-bitmask' .*sparsity_config",
    ),
    Refusal(
        "compressed-tensors", "transforms at run time", COMPRESSED | {"transform_config": ONLINE},
        r"transform_config: R1 \(hadamard\).*location: input",
    ),
    Refusal("AutoRound", "`act_bits` below 16", AUTO_ROUND | {"act_bits": 8}, "act_bits 8.*quantizes activations"),
    *(
        Refusal("AutoRound", name, AUTO_ROUND | {"data_type": name}, f"data_type '{name}'.*only int")
        for name in ("mx_fp", "nv_fp")
    ),
]  # fmt: skip
