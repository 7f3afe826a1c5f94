"""A gate for CI: what was measured once, and whether it is still so.

The same model on the same tokens gives the same numbers; only the order of additions differs between machines. So the gate
does not ask whether a difference could be chance, as it would for other text, but whether there is one: more than
``tolerance`` of the baseline, in either direction. An improvement that nobody can explain is a change all the same, most often
a layer that is no longer quantized. Kernel, attention and bits per weight are part of the baseline for that reason.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import EngineConfig
from runtime.errors import Error, InvalidRequest
from runtime.evaluation.compare import Comparison, compare
from runtime.evaluation.scorer import as_config
from runtime.evaluation.text import require_writable

VERSION = 1
TOLERANCE = 0.02
"""By default, of each number's own scale. Between AVX2 and AVX-512 machines, bfloat16 moves a mean KL by less."""
FEW_TOKENS = 3
"""Top tokens that may tip on a close decision."""
ONE_TOKEN = 5
"""How much more a number may move that a single token decides, the 99 % quantile."""
JUDGED = ("mean_kl", "kl_99", "rms_delta_p", "reference_bits_per_byte", "log_ppl_ratio", "top1_agreement")
FIELDS: dict[str, Any] = {
    "settings": dict, "tolerance": int | float, "recipe": str, "text": str, "tokens": int, "kernels": list,
    "bits_per_weight": int | float,
}  # fmt: skip
"""What a baseline holds beside the metrics, by type. ``attention`` is not in those of before it was told apart."""


@dataclass(frozen=True)
class Finding:
    """One number of the gate. ``allowed`` is the largest difference that passes."""

    name: str
    baseline: float
    found: float
    allowed: float

    @property
    def verdict(self) -> str:
        if abs(self.found - self.baseline) <= self.allowed:
            return "ok"
        better = (self.found > self.baseline) == (self.name == "top1_agreement")
        return "unexplained improvement" if better else "regression"

    def __str__(self) -> str:
        return (
            f"{self.name:<23} {self.baseline:>12.6g} -> {self.found:>12.6g}  "
            f"(± {self.allowed:.2g} allowed)  {self.verdict}"
        )


@dataclass(frozen=True)
class GateResult:
    """``findings`` are the numbers, ``changes`` what else is not as it was, in sentences."""

    comparison: Comparison
    findings: tuple[Finding, ...]
    changes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.changes and all(finding.verdict == "ok" for finding in self.findings)

    def data(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "findings": [vars(finding) | {"verdict": finding.verdict} for finding in self.findings],
            "changes": self.changes,
            "comparison": self.comparison.data(),
        }

    def __str__(self) -> str:
        lines = [*map(str, self.findings), *self.changes]
        remedy = "passed" if self.passed else "FAILED: fix it, or run again with --update and say in the commit why."
        return "\n".join([*lines, remedy])


def baseline_of(comparison: Comparison, settings: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What is kept of a comparison. ``settings`` are what the gate needs to measure it again."""
    return {
        "version": VERSION,
        "settings": settings,
        "tolerance": tolerance,
        "recipe": comparison.recipe,
        "text": comparison.text,
        "tokens": comparison.tokens,
        "kernels": list(comparison.kernels),
        "attention": comparison.attention,
        "bits_per_weight": round(comparison.bits_per_weight, 4),
        "metrics": {name: estimate.data() for name, estimate in comparison.estimates.items()},
    }


def judge(comparison: Comparison, baseline: dict[str, Any]) -> GateResult:
    """Compare with a baseline. Raises :class:`InvalidRequest` if it was not measured on the same tokens."""
    for name in ("recipe", "text", "tokens"):
        if baseline.get(name) != getattr(comparison, name):
            raise InvalidRequest(
                f"the baseline was measured with {name} {baseline.get(name)}, this run with {getattr(comparison, name)}: the "
                "numbers do not compare. Use the same text and settings, or --update."
            )
    metrics, tolerance = baseline["metrics"], baseline["tolerance"]
    was = {name: metrics[name]["value"] for name in metrics}
    now = {name: estimate.value for name, estimate in comparison.estimates.items()}
    tipped = FEW_TOKENS / comparison.tokens
    scales = {
        "mean_kl": was["mean_kl"],
        "kl_99": ONE_TOKEN * was["kl_99"],
        "rms_delta_p": was["rms_delta_p"],
        "reference_bits_per_byte": was["reference_bits_per_byte"],
        "log_ppl_ratio": max(abs(was["log_ppl_ratio"]), was["mean_kl"]),
    }
    findings = [Finding(name, was[name], now[name], tolerance * scale) for name, scale in scales.items()]
    wrong = 1 - was["top1_agreement"]
    agreement = Finding("top1_agreement", was["top1_agreement"], now["top1_agreement"], max(tolerance * wrong, tipped))
    changes = []
    if list(comparison.kernels) != baseline["kernels"]:
        changes.append(f"kernels were {', '.join(baseline['kernels'])}, are {', '.join(comparison.kernels)}")
    if comparison.attention != (was_attention := baseline.get("attention", comparison.attention)):
        changes.append(f"attention was {was_attention}, is {comparison.attention}")
    if abs(comparison.bits_per_weight - baseline["bits_per_weight"]) > 1e-3:
        changes.append(f"bits per weight were {baseline['bits_per_weight']}, are {comparison.bits_per_weight:.4f}")
    return GateResult(comparison, (*findings, agreement), tuple(changes))


def read_baseline(file: str | Path) -> dict[str, Any]:
    """A baseline file. Raises :class:`InvalidRequest` if it is none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequest(f"--baseline {file}: {error}. --update writes one.") from error
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--baseline {file}: {error}. Remove it, and --update writes one.") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise InvalidRequest(
            f"--baseline {file}: it is not a baseline of version {VERSION}. Remove it, and --update writes one."
        )
    metrics = content.get("metrics")
    numbers = [metrics.get(name) for name in JUDGED] if isinstance(metrics, dict) else [None]
    valid = all(isinstance(content.get(name), kind) for name, kind in FIELDS.items())
    if not valid or not all(isinstance(one, dict) and isinstance(one.get("value"), int | float) for one in numbers):
        raise InvalidRequest(
            f"--baseline {file}: it is damaged; a baseline holds {', '.join([*FIELDS, 'metrics'])}, and as metrics "
            f"{', '.join(JUDGED)}. Remove it, and --update writes one."
        )
    return content


def write_baseline(file: str | Path, baseline: dict[str, Any]) -> None:
    """Beside it first and then in its place, so that it is never half written."""
    path = Path(file)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(baseline, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise Error(f"--baseline {file}: {error}") from error


def gate(
    model: str | EngineConfig,
    baseline: str | Path,
    *,
    reference: str | EngineConfig | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    window: int | None = None,
    tolerance: float | None = None,
    update: bool = False,
    progress: bool = False,
) -> GateResult:
    """Compare ``model`` with its reference as the baseline file says, and the result with the file.

    The file remembers the reference with its dtype and revision, text, tokens and window, so later runs name the model alone.
    With ``update`` the file is written, from the arguments and what it said before. Raises :class:`InvalidRequest` where the
    settings are unknown or the numbers do not compare, and what :func:`compare` raises.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InvalidRequest(f"--tolerance {tolerance}: a share of each number, such as {TOLERANCE}; not below 0.")
    old = read_baseline(baseline) if Path(baseline).exists() or not update else None
    if update:
        require_writable("--baseline", baseline, makes_folders=True)
    settings: dict[str, Any] = dict(old["settings"]) if old else {"tokens": 8_000, "window": 512}
    asked = {"text": None if text is None else str(text), "tokens": tokens, "window": window}
    if reference is not None:
        config = as_config(reference)
        settings.pop("reference_revision", None)
        asked |= {
            "reference": config.model,
            "reference_dtype": str(config.dtype).removeprefix("torch."),
            "reference_revision": config.revision,
        }
    settings |= {name: value for name, value in asked.items() if value is not None}
    missing = [name for name in ("reference", "text") if name not in settings]
    if missing:
        raise InvalidRequest(
            f"--baseline {baseline} does not say {' and '.join(missing)} yet: give --{' --'.join(missing)}."
        )
    if not isinstance(reference, EngineConfig):
        candidate = as_config(model)
        reference = EngineConfig(
            settings["reference"],
            dtype=settings.get("reference_dtype", candidate.dtype),
            revision=settings.get("reference_revision"),
            device=candidate.device,
            tokenizer=candidate.tokenizer,
            trust_remote_code=candidate.trust_remote_code,
        )
    comparison = compare(
        reference,
        model,
        settings["text"],
        tokens=settings["tokens"],
        window=settings["window"],
        layers=False,
        progress=progress,
    )
    kept = tolerance if tolerance is not None else old["tolerance"] if old else TOLERANCE
    if update:
        old = baseline_of(comparison, settings, kept)
        write_baseline(baseline, old)
    assert old is not None
    return judge(comparison, old | {"tolerance": kept})
