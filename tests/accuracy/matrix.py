"""The bundled model, quantized by every method that can be had: bits per weight against what was lost.

All arithmetic in float32, by the reference kernel and the reference attention, so that what is seen is the method and
nothing else. AWQ and GPTQ are checkpoints of AutoAWQ and GPTQModel (``benchmarks/quantize_demo*.py``), calibrated on the same
windows. Methods without a checkpoint are applied to the weights here, by :mod:`tests.accuracy.rounding`; the GPTQ of
:mod:`tests.accuracy.calibrated` is for models that no library has quantized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quant.activation import quantize_dequantize
from quant.base import Activation, LinearShape, QuantWeight, Scheme, WeightKind
from quant.linear import QuantLinear
from quant.reference import dequantize
from runtime import Comparison, EngineConfig
from runtime.evaluation.chart import Axis, Panel, figure
from runtime.evaluation.compare import compare_scorers
from runtime.evaluation.gate import GateResult, baseline_of, judge, read_baseline, write_baseline
from runtime.evaluation.scorer import Scorer
from runtime.evaluation.text import read_documents, windows
from tests.accuracy.calibrated import gptq, inputs_of, linears
from tests.accuracy.rounding import quantize

FOLDER = Path(__file__).parent
BASELINES = FOLDER / "baselines"
FIGURES = {"bits": FOLDER / "kl_by_bits.svg", "bytes": FOLDER / "kl_by_bytes.svg"}
WINDOW, TOKENS = 256, 3060
SETTINGS: dict[str, Any] = {"tokens": TOKENS, "window": WINDOW}
DOCUMENTS = read_documents("demo")

EXACT, ROUNDED = 1e-5, 0.02
"""Tolerances: where float32 is all that differs between machines (another attention and other matrix multiplications moved mean
KL by 3e-7), and where its last bit tips a rounding: of inputs, keys or values (2.4e-3)."""

Quantizer = Callable[[Tensor, Scheme, LinearShape], QuantWeight]


@dataclass(frozen=True)
class Row:
    """A method. ``config`` is of a model to load; otherwise the weights of ``demo-bf16`` become ``kind`` in groups of
    ``group`` inputs (-1: all of them), by the GPTQ of this suite if ``calibrated``. ``family`` gives its colour."""

    name: str
    family: str
    config: EngineConfig | None = None
    kind: WeightKind | None = None
    group: int = -1
    zero_point: bool = False
    activation: Activation | None = None
    calibrated: bool = False
    tolerance: float = field(default=EXACT)

    def scheme(self, shape: LinearShape) -> Scheme:
        assert self.kind is not None
        group = shape.in_features if self.group == -1 else self.group
        return Scheme(self.kind, (1, group), zero_point=self.zero_point, activation=self.activation)


def _plain(model: str, **options: Any) -> EngineConfig:
    return EngineConfig(model, **({"dtype": "float32"} | options))


def _int(bits: int, group: int, **options: Any) -> Row:
    size = "channel" if group == -1 else f"g{group}"
    kind = WeightKind.integer(bits)
    return Row(f"int{bits}-{size}", "rounded", kind=kind, group=group, zero_point=True, **options)


def _on_load(name: str, tolerance: float = EXACT, quantization: str | None = None, **options: Any) -> Row:
    """What ``--quantization`` makes of the dense checkpoint while it loads."""
    config = _plain(
        "demo-bf16", quantization=quantization or name, quantization_config=options or None, kernel="reference"
    )
    return Row(f"load-{name}", "on load", config, tolerance=tolerance)


def _cache(name: str) -> Row:
    config = _plain("demo-bf16", kv_cache_dtype=name, attention_backend="reference")
    return Row(f"kv-{name.partition('_')[0]}", "inputs or KV", config, tolerance=ROUNDED)


ROWS = {
    row.name: row
    for row in (
        Row("bf16", "16 bit", _plain("demo-bf16", dtype="bfloat16"), tolerance=0.25),
        Row("awq-int4-g128", "calibrated", _plain("demo", kernel="reference")),
        Row("gptq-int4-g128", "calibrated", _plain(str(FOLDER / "gptq"), kernel="reference")),
        _int(8, 128), _int(6, 128), _int(4, 32), _int(4, 64), _int(4, 128), _int(4, -1), _int(3, 32), _int(3, 128),
        Row("int8-channel", "rounded", kind=WeightKind.INT8),
        Row("fp8-channel", "float", kind=WeightKind.FP8),
        Row("nf4-b64", "float", kind=WeightKind.NF4, group=64),
        Row("fp4-b64", "float", kind=WeightKind.FP4, group=64),
        Row("mxfp4", "float", kind=WeightKind.E2M1, group=32),
        _on_load("int4"), _on_load("fp8", ROUNDED), _on_load("mxfp4"),
        *(_on_load(kind, quantization="bitsandbytes", bnb_4bit_quant_type=kind) for kind in ("nf4", "fp4")),
        _on_load("llm-int8", ROUNDED, quantization="bitsandbytes", load_in_8bit=True),
        _on_load("w8a8-int8", ROUNDED, quantization="w8a8_int8"),
        Row("head-int8", "on load", _plain("demo-bf16", lm_head_quantization="int8", kernel="reference")),
        Row("w8a8-int8", "inputs or KV", kind=WeightKind.INT8, activation=Activation(WeightKind.INT8), tolerance=ROUNDED),
        Row(
            "awq-int4-g128-a8", "inputs or KV", _plain("demo", activation_quantization="int8", kernel="reference"),
            tolerance=ROUNDED,
        ),
        _cache("int8"), _cache("fp8_e4m3"),
    )
}  # fmt: skip


class Remembered(Scorer):
    """A reference that is asked the same again and again."""

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logits(self, ids: list[int]) -> Tensor:
        known = tuple(ids)
        if known not in self._known:
            self._known[known] = super().logits(ids)
        return self._known[known]


class Rounded(Scorer):
    """``demo-bf16`` in float32, its linears replaced by quantized weights, which the reference multiplies by."""

    def __init__(self, row: Row, quantizer: Quantizer = quantize, prepare: Callable[[nn.Module], None] | None = None):
        super().__init__(_plain("demo-bf16"))
        self.label = row.name
        if prepare:
            prepare(self.model)
        inputs = inputs_of(self.model, calibration()) if row.calibrated else {}
        self._bits = self._weights = 0
        for name, layer in linears(self.model).items():
            shape = LinearShape(layer.in_features, layer.out_features)
            make = partial(gptq, inputs=inputs[name]) if row.calibrated else quantizer
            weight = make(layer.weight.data, row.scheme(shape), shape)
            layer.weight.data = dequantize(weight)
            if row.activation:
                layer.register_forward_pre_hook(partial(_quantize_input, how=row.activation))
            self._bits += 8 * (weight.nbytes - (0 if weight.table is None else weight.table.nbytes))
            self._weights += layer.weight.numel()

    @property
    def bits_per_weight(self) -> float:
        return self._bits / self._weights


def _quantize_input(_: nn.Module, args: tuple[Tensor, ...], how: Activation) -> tuple[Tensor]:
    return (quantize_dequantize(args[0], how, None, None),)


@cache
def reference() -> Scorer:
    return Remembered(_plain("demo-bf16"))


def calibration() -> list[list[int]]:
    """Windows that follow those that are measured on."""
    all_of_them = windows(reference().tokenizer, DOCUMENTS, WINDOW, None)
    return [window.ids for window in all_of_them[TOKENS // (WINDOW - 1) :][:10]]


def candidate(row: Row) -> Scorer:
    return Scorer(row.config) if row.config else Rounded(row)


def measure(row: Row, scorer: Scorer | None = None) -> Comparison:
    return compare_scorers(reference(), scorer or candidate(row), DOCUMENTS, tokens=TOKENS, window=WINDOW, layers=False)


def weights_of(row: Row, scorer: Scorer) -> str | None:
    """SHA-256 of the dequantized weights of a checkpoint, the same on every machine: a nibble shows that is too small for the
    loss to tell. ``None`` for what is rounded here, or not at all."""
    digest = hashlib.sha256()
    layers = {name: layer for name, layer in scorer.model.named_modules() if isinstance(layer, QuantLinear)}
    for name, layer in layers.items():
        assert layer.quant_weight is not None
        digest.update(name.encode() + dequantize(layer.quant_weight).numpy().tobytes())
    return digest.hexdigest() if layers and row.family == "calibrated" else None


def baseline_file(row: Row) -> Path:
    return BASELINES / f"{row.name}.json"


def update(row: Row, comparison: Comparison, weights: str | None) -> None:
    settings = {"reference": "demo-bf16", "reference_dtype": "float32", "text": "demo", **SETTINGS}
    baseline = baseline_of(comparison, settings, row.tolerance)
    write_baseline(baseline_file(row), baseline | ({"weights": weights} if weights else {}))


def check(row: Row, comparison: Comparison, weights: str | None) -> GateResult:
    baseline = read_baseline(baseline_file(row))
    result = judge(comparison, baseline)
    if weights == baseline.get("weights"):
        return result
    return replace(result, changes=(*result.changes, "weights are not those that were committed"))


def committed() -> dict[str, dict[str, Any]]:
    return {name: json.loads(baseline_file(row).read_text()) for name, row in ROWS.items()}


def table() -> str:
    """The committed numbers, as Markdown, the smallest loss first."""
    lines = ["| method | bits per weight | mean KL | 99 % KL | top-1 | RMS delta-p |", "|---|---|---|---|---|---|"]
    for name, base in sorted(committed().items(), key=lambda item: item[1]["metrics"]["mean_kl"]["value"]):
        metric = {key: value["value"] for key, value in base["metrics"].items()}
        error = base["metrics"]["mean_kl"]["standard_error"]
        bits = f"{base['bits_per_weight']:.2f}" if base["bits_per_weight"] < 16 else "dense"
        lines.append(
            f"| {name} | {bits} | {metric['mean_kl']:.5f} ± {error:.5f} | {metric['kl_99']:.4f} | "
            f"{100 * metric['top1_agreement']:.1f} % | {100 * metric['rms_delta_p']:.2f} % |"
        )
    return "\n".join(lines)


def figures() -> dict[str, str]:
    """KL against bits per weight, and against bytes of the whole model: SVG by the name of :data:`FIGURES`."""
    plan = reference().plan
    weights = sum(m.shape.in_features * m.shape.out_features for m in plan.modules.values() if m.nbytes)
    others = 2 * plan.other_bytes / plan.dtype.itemsize
    found = {name: (base["bits_per_weight"], base["metrics"]["mean_kl"]["value"]) for name, base in committed().items()}
    found = {name: point for name, point in found.items() if ROWS[name].family not in ("inputs or KV", "on load")}
    bits = {name: (x if ROWS[name].family != "16 bit" else 16.0, kl) for name, (x, kl) in found.items()}
    sizes = {name: ((x * weights / 8 + others) / 1e6, kl) for name, (x, kl) in bits.items()}
    return {
        "bits": _scatter(bits, "Method loss of the bundled model", "bits per weight, scales included"),
        "bytes": _scatter(sizes, "Method loss by the size of the whole model", "megabytes, 16-bit embedding included"),
    }


def _scatter(points: dict[str, tuple[float, float]], title: str, across: str) -> str:
    families = list(dict.fromkeys(row.family for row in ROWS.values()))
    panel = Panel(
        title,
        Axis.around([x for x, _ in points.values()], across, log=True),
        Axis.around([kl for _, kl in points.values()], "mean KL to the original [nat]", log=True),
        height=560,
    )
    shown = {ROWS[name].family for name in points}
    panel.legend([(place, family) for place, family in enumerate(families) if family in shown])
    for name, (x, kl) in points.items():
        panel.point(x, kl, families.index(ROWS[name].family), hint=f"{name}: {x:.2f}, {kl:.3g} nat")
    panel.labels([(x, kl, name) for name, (x, kl) in points.items()])
    return figure([panel], f"{title}: mean KL divergence against {across}")
