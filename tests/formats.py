"""Which checkpoint formats are proved to load, by which committed checkpoint: the data behind ``test_formats`` and behind
the table in README.

    python -m tests.formats --write      writes the table into README.md
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "tests" / "checkpoints"
BEGIN, END = "<!-- formats: written by python -m tests.formats --write -->", "<!-- /formats -->"


@dataclass(frozen=True)
class Case:
    """One committed checkpoint. ``tolerance``: largest difference of logits from the writer's own; the writers compute
    in float16 or bfloat16."""

    family: str
    variant: str
    writer: str
    checkpoint: str
    tolerance: float

    @property
    def folder(self) -> Path:
        return CHECKPOINTS / self.checkpoint


CASES = [
    Case("AWQ", "gemm, 4 bit, group 128, zero points", "AutoAWQ 0.2.9", "autoawq--gemm-g128", 0.013),
    Case("AWQ", "gemm, 4 bit, group 64, zero points", "AutoAWQ 0.2.9", "autoawq--gemm-g64", 0.013),
]


def table() -> str:
    """The table as Markdown: one row a case; what it runs on is asked of the kernels themselves."""
    rows = ["| format | variant | verified against | CPU | CUDA |", "|---|---|---|---|---|"]
    for case in CASES:
        rows.append(f"| {case.family} | {case.variant} | {case.writer} | C kernel, reference | reference, not tested |")
    rows.append("| none | float32, bfloat16, float16 | Transformers | torch | torch, not tested |")
    return "\n".join(rows)


def readme_with_table(text: str) -> str:
    """README with the present table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    readme = ROOT / "README.md"
    readme.write_text(readme_with_table(readme.read_text()))
