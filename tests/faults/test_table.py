"""The table of faults is true to the list, names tests that exist, and every test of the five files is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.catalogue import FAULTS, HERE, table

RUNTIME = Path(__file__).parents[1] / "runtime"


def functions(file: str) -> list[str]:
    return re.findall(r"^def (test_\w+)\(", (RUNTIME / file).read_text(), re.MULTILINE)


def test_the_committed_table_is_that_of_the_list() -> None:
    assert (HERE / "README.md").read_text() == table(), "run python -m tests.faults.catalogue --write"


def test_what_is_named_exists_and_what_exists_is_named() -> None:
    named = {test for fault in FAULTS for test in fault.tests}
    for test in named:
        file, _, function = test.partition("::")
        assert function in functions(file), test
    for kind in ("bodies", "network", "process", "resources", "one_request"):
        file = f"test_server_{kind}.py"
        assert not {f"{file}::{function}" for function in functions(file)} - named
