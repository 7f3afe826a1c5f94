"""``relinear verify M``: is what this machine computes from a checkpoint what the checkpoint says?

For each kind of quantized layer (scheme and shape) the chosen kernel is held to float64, with the weights of one such layer
(:mod:`runtime.verify_kernels`); every stored number is looked at for NaN; on demand the whole model runs against Transformers
with dequantized weights (:mod:`runtime.verify_model`). Weights are read layer by layer. What reads the format is the same
in both: that it reads a tool's files as that tool means them is proved by this project's tests, not here.

The report names versions, machine and checksums, so that the author of a checkpoint can publish it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import Checkpoint, locate
from runtime.config import EngineConfig
from runtime.defaults import context_length, load_tokenizer
from runtime.environment import facts
from runtime.errors import InvalidRequest, LoadError
from runtime.linear_plan import ModulePlan
from runtime.plan import LoadPlan, make_plan
from runtime.report import aligned, plan_lines
from runtime.verify_kernels import Reach, examine, most_distant
from runtime.verify_model import LARGEST_DISTANCE, LARGEST_KL, Comparison, compare
from runtime.weights import StoredWeights

TOKENS = 512
"""Of text, for the comparison of whole models."""
LONGEST_TOKEN = 32
"""Characters, more than the mean of any text: no more of it is tokenized."""


@dataclass(frozen=True)
class KindResult:
    """One scheme and shape: how many layers have it, the one that was examined, and what was found."""

    module: ModulePlan
    count: int
    reaches: tuple[Reach, ...]
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(reach.share <= 1 for reach in self.reaches)


@dataclass(frozen=True)
class Verification:
    """Prints as a report; ``data()`` is the same for programs. ``checksums``: SHA-256 by file name."""

    plan: LoadPlan
    checksums: dict[str, str]
    kinds: tuple[KindResult, ...]
    damage: tuple[str, ...]
    comparison: Comparison | None
    text: str
    environment: list[tuple[str, str]]

    @property
    def passed(self) -> bool:
        whole = self.comparison is None or self.comparison.passed
        return not self.damage and all(kind.passed for kind in self.kinds) and whole

    @property
    def digest(self) -> str:
        """One checksum for all files: SHA-256 over ``sha256  name`` lines, sorted by name, as sha256sum prints them."""
        lines = "".join(f"{value}  {name}\n" for name, value in sorted(self.checksums.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def data(self) -> dict[str, Any]:
        whole = self.comparison
        return {
            "passed": self.passed,
            "model": self.plan.checkpoint.name,
            "format": self.plan.method.summary if self.plan.method else None,
            "sha256": self.digest,
            "files": self.checksums,
            "kinds": [
                {
                    "scheme": str(kind.module.scheme),
                    "in_features": kind.module.shape.in_features,
                    "out_features": kind.module.shape.out_features,
                    "layers": kind.count,
                    "examined": kind.module.name,
                    "kernel": kind.module.kernel,
                    "share_of_bound": {str(r.dtype).removeprefix("torch."): _number(r.share) for r in kind.reaches},
                    "error": kind.error,
                    "passed": kind.passed,
                }
                for kind in self.kinds
            ],
            "damage": list(self.damage),
            "unmatched": list(self.plan.unmatched),
            "against_transformers": whole
            and {
                "text": self.text,
                "tokens": whole.tokens,
                "attention": whole.attention,
                "mean_kl": _number(whole.kl),
                "max_kl": _number(whole.largest_kl),
                "top1": whole.top1,
                "max_logit_difference": _number(whole.logits),
                "first_bad_linear": whole.first_bad_linear,
                "first_bad_layer": whole.first_bad_layer,
                "passed": whole.passed,
            },
            "environment": [list(fact) for fact in self.environment],
        }

    def __str__(self) -> str:
        lines = plan_lines(self.plan)
        lines.append(("sha256", f"{self.digest} of {len(self.checksums)} files"))
        for kind in self.kinds:
            far = kind.error or "; ".join(str(reach) for reach in kind.reaches)
            layers = f"{kind.count} x {kind.module.shape} {kind.module.scheme}"
            lines.append((_word(kind.passed), f"{kind.module.kernel}: {layers}, {kind.module.name}: {far}"))
        lines += [("damage", entry) for entry in self.damage]
        lines += self._comparison_lines()
        lines += self.environment
        return aligned(lines) + f"\n\n{'PASSED' if self.passed else 'FAILED'}"

    def _comparison_lines(self) -> list[tuple[str, str]]:
        whole = self.comparison
        if whole is None:
            return []
        numbers = (
            f"{whole.tokens} tokens of {self.text}, attention {whole.attention}: mean KL {whole.kl:.1e} (below "
            f"{LARGEST_KL:g}), largest {whole.largest_kl:.1e}, same likeliest token {100 * whole.top1:.2f} %, largest "
            f"difference of logits {whole.logits:.1e}"
        )
        inputs = " and with inputs left exact" if any(map(_quantizes_inputs, self.plan.quantized)) else ""
        lines = [
            (
                _word(whole.passed),
                f"whole model in float32{inputs} against Transformers with dequantized weights, {numbers}",
            )
        ]
        for what, name, distances in (
            ("linear layer", whole.first_bad_linear, whole.linears),
            ("decoder layer", whole.first_bad_layer, whole.hidden),
        ):
            if name is not None:
                far = f"{distances[name]:.1e} of its size from the reference, at most {LARGEST_DISTANCE:g} is rounding"
                lines.append(("first bad", f"{what} {name}: {far}"))
        return lines


def verify(
    model: str | Path,
    *,
    against_transformers: bool = False,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    attention_backend: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Verification:
    """Verify a checkpoint with the kernels that ``options`` of :func:`runtime.plan.make_plan` choose. ``text`` is a file to
    run the whole model on, the default a bundled one; ``attention_backend`` what attends in it (``None``: as the engine
    chooses). Raises :class:`LoadError` if it cannot be loaded at all."""
    checkpoint = Checkpoint.open(model, revision, code=trust_remote_code)
    options["trust_remote_code"] = trust_remote_code
    plan = make_plan(checkpoint, **options)
    plan.require_complete()
    weights = StoredWeights.of(plan)
    damage = tuple(weights.damage())
    kinds = tuple(_examine_kinds(plan, weights))
    comparison, source = None, ""
    if against_transformers and not damage and all(kind.error is None for kind in kinds):  # else it cannot be loaded
        exact = {"weight_only": True} if any(map(_quantizes_inputs, plan.quantized)) else {}
        whole = make_plan(checkpoint, **options | {"dtype": "float32"} | exact)
        ids, source = _ids(checkpoint, whole, text, tokens)
        comparison = compare(StoredWeights.of(whole), ids, attention_backend)
    return Verification(plan, _checksums(checkpoint), kinds, damage, comparison, source, facts())


def _quantizes_inputs(module: ModulePlan) -> bool:
    """Such layers are examined with their inputs quantized, but a whole model cannot be compared so: a number that is rounded
    up instead of down, because a sum before was formed in another order, changes everything behind it."""
    return module.scheme is not None and module.scheme.activation is not None


@torch.inference_mode()
def _examine_kinds(plan: LoadPlan, weights: StoredWeights) -> Iterator[KindResult]:
    kinds: dict[Any, list[ModulePlan]] = {}
    for module in plan.quantized:
        kinds.setdefault((module.scheme, module.shape, module.kernel), []).append(module)
    for modules in kinds.values():
        first = modules[0]
        assert first.choice is not None
        try:
            found = most_distant(examine(first.choice.kernel, weights.quantized(first), weights.bias(first)))
            yield KindResult(first, len(modules), tuple(found.values()))
        except LoadError as error:
            yield KindResult(first, len(modules), (), str(error))


def _ids(checkpoint: Checkpoint, plan: LoadPlan, text: str | Path | None, count: int) -> tuple[list[int], str]:
    """Token ids to run, and what they are."""
    count = min(count, context_length(plan.config) or count)
    if count < 2:
        raise InvalidRequest(f"--tokens {count}: at least 2 are needed.")
    try:
        tokenizer = load_tokenizer(EngineConfig(checkpoint.name, trust_remote_code=plan.trust_remote_code), checkpoint)
    except LoadError:
        if text is not None:
            raise
        return _random_ids(plan, count), "random ids (it has no tokenizer)"
    file = Path(text) if text is not None else locate("demo").parent / "heldout.txt"
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--text {file}: {error}") from error
    ids = tokenizer(content[: count * LONGEST_TOKEN])["input_ids"][:count]
    if len(ids) < 2 and text is None:  # what Transformers makes of a model type that has a tokenizer, without its files
        return _random_ids(plan, count), "random ids (its tokenizer is empty)"
    if len(ids) < 2:
        raise InvalidRequest(f"--text {file}: it has {len(ids)} tokens, at least 2 are needed.")
    return ids, file.name


def _random_ids(plan: LoadPlan, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(plan.config.get_text_config().vocab_size, (count,), generator=generator).tolist()
    return ids


def _checksums(checkpoint: Checkpoint) -> dict[str, str]:
    found = {}
    for path in (checkpoint.folder / "config.json", *checkpoint.files):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value != torch.inf else None


def _word(passed: bool) -> str:
    return "pass" if passed else "FAIL"
