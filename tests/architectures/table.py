"""ARCHITECTURES.md: what the sweep found, for people, and read back by the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.sweep import TOLERANCE, Finding

TABLE = Path(__file__).parents[2] / "ARCHITECTURES.md"
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_INTRODUCTION = """# Architectures

Every type of Transformers' causal mapping, as a tiny model with random weights and options that bite (windows shorter
than the prompt, grouped heads, softcaps), served by the engine in float32: chunked prefill beside decodes, a preemption,
an abort, a shared prefix. **exact**: tokens are those of each sequence alone through eager Transformers, log-probabilities
within {tolerance:.0e} of the largest logit. **refused**: loading for the engine ends with this message; nothing is served
that is not exact. **not built**: no tiny model of it runs alone in Transformers either.

Written by `make architectures` with {versions}: {counts}.
"""


def render(findings: Sequence[Finding]) -> str:
    """The page."""
    verdicts = Counter(finding.verdict for finding in findings)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    lines = [_INTRODUCTION.format(tolerance=TOLERANCE, versions=versions(), counts=counts)]
    lines += ["| type | verdict | how, or why not |", "|---|---|---|"]
    for finding in findings:
        note = finding.note.replace("|", "\\|")
        lines.append(f"| {finding.model_type} | {finding.verdict} | {note} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    return f"transformers {transformers.__version__}"


def written() -> dict[str, Finding]:
    """The findings on the page, by type."""
    found = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| type"):
            model_type, verdict, note = (cell.strip() for cell in line.replace("\\|", "\0").split("|")[1:-1])
            found[model_type] = Finding(model_type, verdict, note.replace("\0", "|"))
    return found
