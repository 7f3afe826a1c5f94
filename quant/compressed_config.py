"""The ``quantization_config`` of compressed-tensors: groups of targets, each with a scheme.

Read as plain data; fields that only say how scales were found (``observer``, ``actorder: static``) are left aside, values
that decide the format and are not known are refused. Sources: compressed-tensors 0.20.0 ``quantization/quant_args.py``,
``quant_scheme.py`` (presets), ``transform/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from quant import matching
from quant.base import Activation, BadCheckpoint, LinearShape, UnsupportedCheckpoint, WeightKind
from quant.scheme import ScaleRule

FORMATS = {
    "dense", "fakequant", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized",
    "mxfp8-quantized", "naive-quantized", "nvfp4-pack-quantized", "pack-quantized", "sparse-24-bitmask",
}  # fmt: skip
OFFLINE = ("weight_input", "weight_output")
"""Where a transform is folded into the stored weight and nothing is left to do."""

KEYS_OR_VALUES = r"[kv](_proj|\b)|qkv"
"""In targets: layers whose outputs go to the KV cache."""

FLOATS = {8: WeightKind.FP8, 4: WeightKind.E2M1}
Args = dict[str, Any]
TOKEN = {"type": "int", "strategy": "token", "dynamic": True}
INT8_TOKEN = TOKEN | {"num_bits": 8}
FP8_TOKEN = INT8_TOKEN | {"type": "float"}
FP8_GROUP = FP8_TOKEN | {"strategy": "group", "group_size": 128}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}
FP8_BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP4, MXFP6, MXFP8 = ({"num_bits": bits} | MX for bits in (4, 6, 8))


def _groups(bits: int) -> Args:
    return {"num_bits": bits, "group_size": 128}


PRESETS: dict[str, tuple[Args | None, Args | None]] = {
    "UNQUANTIZED": (None, None),
    **{f"W{bits}A16": (_groups(bits), None) for bits in range(2, 9)},
    **{f"W{bits}A8": (_groups(bits), INT8_TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": (_groups(bits), TOKEN | {"num_bits": 4}) for bits in (2, 3, 4)},
    "W4A16_ASYM": (_groups(4) | {"symmetric": False}, None),
    "W4AFP8": (_groups(4), FP8_TOKEN),
    "W8A8": (CHANNEL, INT8_TOKEN),
    "INT8": (CHANNEL, INT8_TOKEN),
    "FP8": (FP8_TENSOR, FP8_TENSOR),
    "FP8_DYNAMIC": (CHANNEL | {"type": "float"}, FP8_TOKEN),
    "FP8_BLOCK": (FP8_BLOCK, FP8_GROUP),
    "NVFP4A16": (NVFP4, None),
    "NVFP4": (NVFP4, NVFP4 | {"dynamic": "local"}),
    "MXFP4A16": (MXFP4, None),
    "MXFP4": (MXFP4, MXFP4 | {"dynamic": True}),
    "MXFP4XFP8": (MXFP4, FP8_GROUP),
    "MXFP6A16": (MXFP6, None),
    "MXFP6A8": (MXFP6, MXFP8 | {"dynamic": True}),
    "MXFP8A16": (MXFP8, None),
    "MXFP8": (MXFP8, MXFP8 | {"dynamic": True}),
}
"""Schemes by name, ``{"FP8_DYNAMIC": ["Linear"]}``: weights and inputs. Floats of six bits are refused, as if written out."""


@dataclass(frozen=True)
class Weights:
    """How a group's weights are quantized. ``block`` holds -1 for "all of them"; ``ordered``: inputs say their group."""

    kind: WeightKind
    block: tuple[int, int]
    symmetric: bool
    ordered: bool

    def block_of(self, shape: LinearShape) -> tuple[int, int]:
        rows, columns = self.block
        return (shape.out_features if rows == -1 else rows, shape.in_features if columns == -1 else columns)


@dataclass(frozen=True)
class Group:
    name: str
    targets: tuple[str, ...]
    weights: Weights
    inputs: Activation | None

    def rank(self, layer: str, classes: Iterable[str] = matching.LINEAR_CLASSES) -> int | None:
        """How closely the group's nearest target means this layer, a module of ``classes``."""
        ranks = (matching.compressed_rank(target, layer, classes) for target in self.targets)
        return min((rank for rank in ranks if rank is not None), default=None)


@dataclass(frozen=True)
class CompressedConfig:
    """``continuous``: codes of 3, 5, 6 and 7 bits run on over the ends of words, if their number leaves both possible."""

    format: str
    version: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        fmt = str(config.get("format") or "dense").lower()
        _refuse(config, fmt)
        groups = []
        entries = config.get("config_groups") or {}
        if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping | list) for entry in entries.values()):
            raise BadCheckpoint("quantization_config: config_groups must map names to schemes or to lists of targets.")
        for name, entry in entries.items():
            scheme = _preset(name, entry) if isinstance(entry, list) else entry
            targets = tuple(str(target) for target in scheme.get("targets") or ())
            own = str(scheme.get("format") or fmt).lower()
            if own not in FORMATS:
                raise _unknown_format(own, f"config_groups: {name}: format")
            if all(target.endswith("Attention") for target in targets):
                continue  # quantizes keys and values, or nothing
            if not any(scheme.get(part) for part in ("weights", "input_activations", "output_activations")):
                continue  # leaves its layers dense, as their tensors will say
            if scheme.get("weights") is None:
                raise UnsupportedCheckpoint(
                    f"quantization_config: config_groups: {name} quantizes inputs of layers whose weights it leaves dense; "
                    "that is not supported. Remove the group to run these layers unquantized."
                )
            if scheme.get("output_activations") and not all(re.search(KEYS_OR_VALUES, target) for target in targets):
                raise UnsupportedCheckpoint(
                    f"quantization_config: config_groups: {name}: output_activations are not supported, except those of keys "
                    "and values, which a quantized KV cache wants. Set the entry to null to leave outputs alone."
                )
            inputs = scheme.get("input_activations")
            groups.append(Group(name, targets, _weights(name, scheme["weights"]), inputs and _inputs(name, inputs)))
        return cls(fmt, str(config.get("version") or ""), tuple(groups), tuple(map(str, config.get("ignore") or ())))

    @property
    def continuous(self) -> bool:
        numbers = [int(part) for part in self.version.split(".")[:2] if part.isdecimal()]
        return numbers >= [0, 18]

    def group_of(self, layer: str, classes: Iterable[str] = matching.LINEAR_CLASSES) -> Group | None:
        """The group with the closest target; of two as close the first."""
        found = ((group.rank(layer, classes), place) for place, group in enumerate(self.groups))
        ranked = [(rank, place) for rank, place in found if rank is not None]
        return self.groups[min(ranked)[1]] if ranked else None

    def ignored(self, layer: str, classes: Iterable[str] = matching.LINEAR_CLASSES) -> str | None:
        """The entry of ``ignore`` that means this layer."""
        return next((entry for entry in self.ignore if matching.compressed_tensors(entry, layer, classes)), None)

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """Entries that mean none of the layers, with their field. A target that names a class is a default and always
        right."""
        known = list(layers)
        missed = [("ignore", matching.unmatched(self.ignore, known, matching.compressed_tensors))]
        for group in self.groups:
            named = [target for target in group.targets if target not in matching.LINEAR_CLASSES]
            field = f"config_groups: {group.name}: targets"
            missed.append((field, matching.unmatched(named, known, matching.compressed_tensors)))
        return [f"{field}: {entry}" for field, entries in missed for entry in entries]


def _refuse(config: Mapping[str, Any], fmt: str) -> None:
    """Raise :class:`UnsupportedCheckpoint` for what applies to the whole file and is not implemented."""
    if fmt not in FORMATS:
        raise _unknown_format(fmt, "format")
    sparsity = config.get("sparsity_config") or {}
    if (sparse := str(sparsity.get("format") or "dense").lower()) not in ("dense", "sparse-24-bitmask"):
        raise _unknown_format(sparse, "sparsity_config: format")
    for name, transform in ((config.get("transform_config") or {}).get("config_groups") or {}).items():
        online = sorted({str(apply.get("location")) for apply in transform.get("apply") or ()} - set(OFFLINE))
        if online:
            raise UnsupportedCheckpoint(
                f"quantization_config: transform_config: {name} ({transform.get('type')}) transforms activations while the "
                f"model runs (location: {', '.join(online)}); only transforms folded into weights ({', '.join(OFFLINE)}) are "
                "supported. Without it the model computes garbage. Use a copy quantized without QuIP or SpinQuant."
            )


def _unknown_format(found: str, where: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"compressed-tensors format {found!r} (quantization_config: {where}) is not supported; known: "
        f"{', '.join(sorted(FORMATS))}. Use another copy of the model, or quantize it again with a current llm-compressor."
    )


def _preset(name: str, targets: list[str]) -> dict[str, Any]:
    if name.upper() not in PRESETS:
        raise UnsupportedCheckpoint(
            f"quantization_config: config_groups: {name!r} is no preset that is known ({', '.join(PRESETS)}). "
            "Write the scheme out in the configuration."
        )
    weights, inputs = PRESETS[name.upper()]
    return {"targets": targets, "weights": weights, "input_activations": inputs}


def _kind(group: str, part: str, args: Mapping[str, Any]) -> WeightKind:
    bits, number = args.get("num_bits", 8), str(args.get("type") or "int").lower()
    if number == "int" and bits in range(2, 9):
        return WeightKind.integer(bits)
    if number == "float" and bits in FLOATS:
        return FLOATS[bits]
    raise UnsupportedCheckpoint(
        f"quantization_config: config_groups: {group}: {part} of type {number!r} with {bits!r} bits (num_bits) are not "
        "supported, only int of 2 to 8 bits and float of 8 and 4."
    )


def _strategy(args: Mapping[str, Any]) -> str:
    """The strategy, or what compressed-tensors infers where it is left out."""
    size = args.get("group_size")
    inferred = "tensor" if size is None else "group" if size > 0 else "channel"
    return str(args.get("strategy") or inferred).lower()


def _weights(group: str, args: Mapping[str, Any]) -> Weights:
    strategy, size = _strategy(args), args.get("group_size")
    blocks = {"tensor": (-1, -1), "channel": (1, -1)}
    if strategy in blocks:
        block = blocks[strategy]
    elif strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        block = (1, size)
    elif strategy == "block" and args.get("block_structure"):
        structure = args["block_structure"]
        sizes = re.findall(r"\d+", structure) if isinstance(structure, str) else list(structure)
        if len(sizes) != 2 or not all(int(size) > 0 for size in sizes):
            raise BadCheckpoint(
                f"quantization_config: config_groups: {group}: block_structure is {structure!r}, not two sizes."
            )
        block = (int(sizes[0]), int(sizes[1]))
    else:
        raise UnsupportedCheckpoint(
            f"quantization_config: config_groups: {group}: weights with strategy {strategy!r}, group_size {size!r} and "
            f"block_structure {args.get('block_structure')!r} are not supported."
        )
    # ``weight`` and ``static`` only say in which order scales were found; an old file says true.
    ordered = strategy == "group" and str(args.get("actorder")).lower() in ("group", "dynamic", "true")
    return Weights(_kind(group, "weights", args), block, bool(args.get("symmetric", True)), ordered)


def _inputs(group: str, args: Mapping[str, Any]) -> Activation:
    kind, strategy, dynamic = _kind(group, "input_activations", args), _strategy(args), args.get("dynamic", False)
    local = dynamic == "local" and kind is WeightKind.E2M1
    symmetric, size = bool(args.get("symmetric", True)), args.get("group_size")
    if strategy == "tensor" and dynamic is False:
        return Activation(kind, static=True, symmetric=symmetric)
    if strategy in ("token", "tensor") and dynamic is True:
        return Activation(kind, symmetric=symmetric, whole=strategy == "tensor")
    if strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0 and (dynamic is True or local):
        powers = not kind.is_integer and size == 32 and "uint8" in str(args.get("scale_dtype"))
        rule = ScaleRule.LOCAL if local else ScaleRule.POWER if powers else ScaleRule.FLOAT
        return Activation(kind, group=size, symmetric=symmetric, rule=rule)
    raise UnsupportedCheckpoint(
        f"quantization_config: config_groups: {group}: input_activations of {kind.value} with strategy {strategy!r}, dynamic "
        f"{dynamic!r} and group_size {size!r} are not supported: dynamic ones may be per token, tensor or group, those of "
        "4-bit floats also 'local', static ones per tensor. "
        "Set the entry to null to run the weights alone."
    )
