"""The sweep over every causal architecture that Transformers knows.

    python -m tests.architectures                 examines all of them and prints what it finds
    python -m tests.architectures --write         and writes ARCHITECTURES.md
    python -m tests.architectures llama mamba2    only these

The status is 1 if anything is served that is not exact.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
import transformers

from tests.architectures.sweep import examine
from tests.architectures.table import TABLE, TYPES, render


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description="examine architectures")
    parser.add_argument("types", nargs="*", help="default: every type of Transformers' causal mapping")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}; only with all types")
    options = parser.parse_args()
    if options.write and options.types:
        parser.error("--write needs all types")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    findings = []
    for model_type in options.types or TYPES:
        findings.append(examine(model_type))
        print(f"{model_type}: {findings[-1].verdict}. {findings[-1].note}", flush=True)
    if options.write:
        TABLE.write_text(render(findings))
    return int(any(finding.verdict == "wrong" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
