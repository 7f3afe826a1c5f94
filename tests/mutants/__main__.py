"""``make mutants``: break the sources on purpose, one mistake at a time, and see that the suite notices.

    python -m tests.mutants [NAME ...] [--write]     --write puts the kill table into tests/mutants/README.md

Works on a copy of the tree in a temporary directory. The killers first have to pass there unchanged. Exits with 1 if a
mutant survives one of its killers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch  # noqa: F401  inherited by every fork
import transformers  # noqa: F401

from tests.mutants.catalogue import MUTANTS, ROOT, Mutant

HEAD = """# Mutants

Mistakes made on purpose, and the tests that noticed. Written by `make mutants`; `tests/mutants/catalogue.py` says what each one
changes. A survivor fails the target.

| mutant | in | killed by |
|---|---|---|
"""
PACKAGES = ("runtime", "quant", "attention", "tests")
PASSED, FAILED = 0, 1
"""Exit codes of pytest; every other one is no verdict."""


def copy_tree(to: Path) -> None:
    """The sources and tests; checkpoints and the bundled model, which no mutant changes, as links."""
    for folder in PACKAGES:
        shutil.copytree(
            ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "checkpoints", "bundled")
        )
    for linked in ("tests/checkpoints", "runtime/bundled"):
        (to / linked).symlink_to(ROOT / linked)
    for file in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / file, to)


def run(tree: Path, nodes: list[str]) -> tuple[int, str]:
    """Pytest's exit code and output on a tree. In a fork of this process, which has imported what takes long to import; what
    it has imported of ours, the fork forgets."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            os.chdir(tree)
            for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
                del sys.modules[name]
            sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != ROOT)]
            os.environ["PYTHONPATH"] = str(tree)  # of the processes that tests start
            sys.dont_write_bytecode = True
            code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", "-rf", "--tb=no", *nodes])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def survives(mutant: Mutant, tree: Path) -> list[str]:
    """The killers that pass although the mutant is in the tree."""
    file = tree / mutant.file
    original = file.read_text()
    assert original.count(mutant.before) == 1, f"{mutant.name}: {mutant.file} does not hold once: {mutant.before}"
    file.write_text(original.replace(mutant.before, mutant.after))
    try:
        code, output = run(tree, list(mutant.killers))
    finally:
        file.write_text(original)
    if code not in (PASSED, FAILED):
        sys.exit(f"{mutant.name}: no verdict ({code}):\n{output}")
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("FAILED ")]
    return [killer for killer in mutant.killers if not any(node.startswith(killer) for node in failed)]


def row(mutant: Mutant) -> str:
    killers = ", ".join(f"`{killer.removeprefix('tests/')}`" for killer in mutant.killers)
    return f"| {mutant.name} | `{mutant.file}` | {killers} |\n"


def table() -> str:
    """The kill table of all mutants as Markdown."""
    return HEAD + "".join(row(mutant) for mutant in MUTANTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("names", nargs="*", help="run these alone")
    parser.add_argument("--write", action="store_true", help="write the kill table when all were run and none survives")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    if len(chosen) < len(arguments.names):
        sys.exit(f"known mutants: {', '.join(mutant.name for mutant in MUTANTS)}")
    alive: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        code, output = run(tree, sorted({killer for mutant in chosen for killer in mutant.killers}))
        if code != PASSED:
            sys.exit(f"the killers have to pass before anything is changed:\n{output}")
        for mutant in chosen:
            started = time.perf_counter()
            left = survives(mutant, tree)
            verdict = f"SURVIVES {', '.join(left)}" if left else "killed"
            print(f"{mutant.name:<45} {verdict}  {time.perf_counter() - started:.0f} s", flush=True)
            if left:
                alive[mutant.name] = left
    if alive:
        sys.exit(
            f"{len(alive)} of {len(chosen)} mutants survive: {', '.join(alive)}. A test is missing or does not bite."
        )
    print(f"{len(chosen)} of {len(chosen)} mutants killed\n\n{table()}")
    if arguments.write and chosen == list(MUTANTS):
        (Path(__file__).parent / "README.md").write_text(table())


if __name__ == "__main__":
    main()
