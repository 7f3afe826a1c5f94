"""Two models side by side on the same text: how far the candidate's distributions are from the reference's, token by token.

One window at a time through both, and a slice of its rows at a time through the arithmetic: no logits are kept, on disk or
in memory. The measures are those of llama.cpp's ``perplexity --kl-divergence``; why they and not scores on tasks: "Accuracy
is Not All You Need" (arXiv 2407.09141).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.config import EngineConfig
from runtime.errors import Error, InvalidRequest
from runtime.evaluation.estimate import Estimate, mean, quantile, ratio, root_mean_square
from runtime.evaluation.layers import LayerError, LayerErrors, decoder_layers
from runtime.evaluation.scorer import Scorer, as_config
from runtime.evaluation.text import Document, Text, Window, fingerprint, plain_ids, read_documents, windows

ROW_ELEMENTS = 4_000_000
"""Log-probabilities that are looked at together, in float64."""
LAYER_TOKENS = 2048
"""Tokens that the errors of layers are measured on; they settle much sooner than the rest."""
POSITIONS = 32
"""Stretches of a window for which mean KL is told apart."""


@dataclass(frozen=True)
class Comparison:
    """How a candidate differs from a reference. KL divergences of the reference's distribution from the candidate's, in
    nats; bits per byte of UTF-8; shares between 0 and 1; delta-p is the change in probability of the token that comes next.

    ``kernels`` and ``attention`` are what multiplied and attended in the candidate. ``recipe`` and ``text`` (SHA-256) say what
    was measured on: numbers of another recipe or text do not compare. ``per_token`` are the KL divergences behind the
    histogram, ``kl_by_position`` pairs of a position in the window and the mean there.
    Standard errors are clustered by window.
    """

    reference: str
    candidate: str
    recipe: str
    text: str
    tokens: int
    windows: int
    bytes: int
    bits_per_weight: float
    kernels: tuple[str, ...]
    attention: str
    mean_kl: Estimate
    median_kl: Estimate
    kl_99: Estimate
    kl_999: Estimate
    log_ppl_ratio: Estimate
    reference_bits_per_byte: Estimate
    bits_per_byte: Estimate
    top1_agreement: Estimate
    rms_delta_p: Estimate
    kl_by_position: tuple[tuple[int, float], ...] = field(repr=False)
    layers: tuple[LayerError, ...] = field(repr=False)
    per_token: Tensor = field(repr=False, compare=False)

    @property
    def estimates(self) -> dict[str, Estimate]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Estimate)}

    def data(self) -> dict[str, Any]:
        """For JSON: everything but the single tokens."""
        plain = (
            "reference", "candidate", "recipe", "text", "tokens", "windows", "bytes", "bits_per_weight", "kernels", "attention",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in plain},
            "standard_errors": "clustered by window",
            **{name: estimate.data() for name, estimate in self.estimates.items()},
            "kl_by_position": self.kl_by_position,
            "layers": [layer.data() for layer in self.layers],
        }

    def plot(self) -> str:
        """An SVG: the histogram of KL, KL by position, and the error of every layer."""
        from runtime.evaluation.figures import comparison_figure

        return comparison_figure(self)

    def __str__(self) -> str:
        rows = [(LABELS[name], str(estimate)) for name, estimate in self.estimates.items()]
        wide = max(len(label) for label, _ in rows)
        lines = [
            f"reference  {self.reference}",
            f"candidate  {self.candidate}: {self.bits_per_weight:.2f} bits per weight, kernel {', '.join(self.kernels)}; "
            f"attention {self.attention}",
            f"recipe     {self.recipe}: {self.tokens} tokens, {self.windows} windows, text {self.text[:12]}",
            *(f"{label:<{wide}}  {value}" for label, value in rows),
        ]
        if self.layers:
            worst = min(self.layers, key=lambda layer: layer.sqnr)
            lines.append(f"worst layer  {worst.name}: {worst.sqnr:.1f} dB")
        return "\n".join([*lines, "± is one standard error, clustered by window"])


LABELS = {
    "mean_kl": "mean KL [nat]",
    "median_kl": "median KL",
    "kl_99": "99 % KL",
    "kl_999": "99.9 % KL",
    "log_ppl_ratio": "ln(PPL ratio)",
    "reference_bits_per_byte": "bits per byte, reference",
    "bits_per_byte": "bits per byte, candidate",
    "top1_agreement": "top-1 agreement",
    "rms_delta_p": "RMS delta-p",
}


def compare(
    reference: str | EngineConfig,
    candidate: str | EngineConfig,
    text: Text,
    *,
    tokens: int | None = 20_000,
    window: int = 512,
    layers: bool = True,
    progress: bool = False,
) -> Comparison:
    """Load two models and compare them on ``tokens`` tokens of a text (a file, a folder, ``demo``, or documents), in windows
    of ``window`` tokens.

    What differs between the sides is said by their configurations: another checkpoint, another ``kernel``, ``quantization``,
    ``dtype`` or ``kv_cache_dtype`` of the same one. ``layers`` measures the error of every layer as well, where both sides are
    plain models. Raises :class:`LoadError`, :class:`InvalidRequest`, and :class:`Error` for logits that are not finite.
    """
    documents = read_documents(text)
    return compare_scorers(
        Scorer(as_config(reference)),
        Scorer(as_config(candidate)),
        documents,
        tokens=tokens,
        window=window,
        layers=layers,
        progress=progress,
    )


def compare_scorers(
    reference: Scorer,
    candidate: Scorer,
    documents: list[Document],
    *,
    tokens: int | None = 20_000,
    window: int = 512,
    layers: bool = True,
    progress: bool = False,
) -> Comparison:
    """The same for models that are loaded already."""
    require_same_tokens(reference, candidate, documents)
    for side in (reference, candidate):
        side.require_length(window)
    chosen = windows(reference.tokenizer, documents, window, tokens)
    errors = _layer_errors(reference, candidate) if layers else None
    parts: list[dict[str, Tensor]] = []
    total = sum(len(one.ids) - one.scored for one in chosen)
    watched = 0
    with tqdm(total=total, desc="tokens", unit="tok", disable=not progress, file=sys.stderr) as bar:
        for number, one in enumerate(chosen):
            if errors is not None and watched < LAYER_TOKENS:
                with errors.watching():
                    ours = reference.logits(one.ids)
                watched += len(one.ids)
            else:
                ours = reference.logits(one.ids)
            part = token_differences(ours, candidate.logits(one.ids), one)
            part["window"] = torch.full_like(part["position"], number)
            parts.append(part)
            bar.update(len(one.ids) - one.scored)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    start = "bos" if reference.tokenizer.bos_token_id is not None else "overlap"
    return _summary(
        reference, candidate, f"kl/window={window}/{start}", fingerprint(documents), chosen, joined,
        errors.result() if errors is not None else (),
    )  # fmt: skip


def require_same_tokens(reference: Scorer, candidate: Scorer, documents: list[Document]) -> None:
    """Raise :class:`InvalidRequest` unless the same ids mean the same text on both sides."""
    if reference.vocabulary != candidate.vocabulary:
        raise InvalidRequest(
            f"{reference.label} has {reference.vocabulary} tokens and {candidate.label} {candidate.vocabulary}: their "
            "distributions cannot be compared. The candidate must be the same model, quantized."
        )
    for document in documents:
        start = document.text[:20_000]
        ours, theirs = (plain_ids(side.tokenizer, start) for side in (reference, candidate))
        if ours != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise InvalidRequest(
                f"the tokenizers of {reference.label} and {candidate.label} differ: token {place} of {document.name} is "
                f"{ours[place : place + 1]} here and {theirs[place : place + 1]} there. "
                "Name one for both: --tokenizer-path."
            )


@torch.inference_mode()
def token_differences(reference: Tensor, candidate: Tensor, window: Window) -> dict[str, Tensor]:
    """What is kept of each scored token of a window, from the logits ``[tokens, vocabulary]`` of both sides."""
    first = window.scored - 1
    target = torch.tensor(window.ids[window.scored :])
    rows = max(1, ROW_ELEMENTS // reference.shape[-1])
    parts = []
    for start in range(first, len(window.ids) - 1, rows):
        stop = min(start + rows, len(window.ids) - 1)
        ours = reference[start:stop].cpu().double().log_softmax(-1)
        theirs = candidate[start:stop].cpu().double().log_softmax(-1)
        at = target[start - first : stop - first, None]
        ours_at, theirs_at = ours.gather(1, at)[:, 0], theirs.gather(1, at)[:, 0]
        parts.append(
            {
                "kl": (ours.exp() * (ours - theirs)).sum(-1),
                "ours": -ours_at,
                "theirs": -theirs_at,
                "same": (ours.argmax(-1) == theirs.argmax(-1)).double(),
                "delta_p": theirs_at.exp() - ours_at.exp(),
                "position": torch.arange(start, stop),
            }
        )
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return joined | {"bytes": torch.full_like(joined["kl"], window.bytes / len(target))}


def _layer_errors(reference: Scorer, candidate: Scorer) -> LayerErrors | None:
    """``None`` where layers cannot be compared one by one."""
    if reference.paged or candidate.paged:
        return None
    if len(decoder_layers(reference.model)) != len(decoder_layers(candidate.model)):
        return None
    return LayerErrors(reference.model, candidate.model)


def _summary(
    reference: Scorer,
    candidate: Scorer,
    recipe: str,
    text: str,
    chosen: list[Window],
    of: dict[str, Tensor],
    layers: tuple[LayerError, ...],
) -> Comparison:
    clusters, kl = of["window"], of["kl"]
    if not kl.isfinite().all():
        raise Error(f"{candidate.label} gives a probability of zero where {reference.label} does not: KL is infinite.")
    width = max(1, -(-(int(of["position"].max()) + 1) // POSITIONS))
    places = of["position"] // width
    per_bit = torch.log(torch.tensor(2.0, dtype=torch.float64))
    return Comparison(
        reference=reference.label,
        candidate=candidate.label,
        recipe=recipe,
        text=text,
        tokens=len(kl),
        windows=len(chosen),
        bytes=sum(window.bytes for window in chosen),
        bits_per_weight=candidate.bits_per_weight,
        kernels=tuple(candidate.kernels),
        attention=candidate.attention,
        mean_kl=mean(kl, clusters),
        median_kl=quantile(kl, 0.5, clusters),
        kl_99=quantile(kl, 0.99, clusters),
        kl_999=quantile(kl, 0.999, clusters),
        log_ppl_ratio=mean(of["theirs"] - of["ours"], clusters),
        reference_bits_per_byte=ratio(of["ours"] / per_bit, of["bytes"], clusters),
        bits_per_byte=ratio(of["theirs"] / per_bit, of["bytes"], clusters),
        top1_agreement=mean(of["same"], clusters),
        rms_delta_p=root_mean_square(of["delta_p"], clusters),
        kl_by_position=tuple(
            (int(place) * width, kl[places == place].mean().item()) for place in places.unique().tolist()
        ),
        layers=layers,
        per_token=kl,
    )
