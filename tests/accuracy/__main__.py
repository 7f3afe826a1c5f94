"""``make accuracy``: what every method loses, its gates and its figures; and the runtime fidelity of every format, kernel and
path. ``--update`` writes the baselines from this run."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from tests.accuracy import fidelity, matrix

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- accuracy: written by python -m tests.accuracy -->", "<!-- /accuracy -->"


class Warnings(logging.Handler):
    """What is said while models load, each once, to be shown where it does not tear a table apart."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said.setdefault(record.getMessage())


def readme_with_table(text: str) -> str:
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    assert start, "README has lost the marks of the table"
    assert end, "README has lost the marks of the table"
    return f"{before}{START}\n{matrix.table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy")
    parser.add_argument(
        "--update", action="store_true", help="write the baselines from this run; say in the commit why"
    )
    update = parser.parse_args().update
    warnings = Warnings()
    logging.getLogger().addHandler(warnings)
    torch.use_deterministic_algorithms(True, warn_only=True)
    failed = []
    for name, row in matrix.ROWS.items():
        scorer = matrix.candidate(row)
        found, weights = matrix.measure(row, scorer), matrix.weights_of(row, scorer)
        print(
            f"{name:<16} {found.bits_per_weight:6.2f} bits  KL {found.mean_kl.value:.6f} ± {found.mean_kl.standard_error:.6f}  "
            f"99 % {found.kl_99.value:.4f}  top-1 {100 * found.top1_agreement.value:.2f} %  "
            f"RMS delta-p {100 * found.rms_delta_p.value:.2f} %",
            flush=True,
        )
        if update:
            matrix.update(row, found, weights)
        else:
            result = matrix.check(row, found, weights)
            if not result.passed:
                failed.append(name)
                print(result)
    print(
        f"\nRuntime fidelity: mean KL to Transformers with dequantized weights, in float32\n{fidelity.header()}",
        flush=True,
    )
    for line in fidelity.table():
        print(fidelity.line(line), flush=True)
        if line.failures:
            failed.append(f"{line.model} ({line.kernels})")
    if warnings.said:
        print("\nSaid while loading:", *warnings.said, sep="\n")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    for kind, svg in matrix.figures().items():
        matrix.FIGURES[kind].write_text(svg)
    README.write_text(readme_with_table(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
