"""The list of mutants cannot rot: every change still applies, every killer exists, the committed table is that of the list.

``make mutants`` runs them.
"""

from __future__ import annotations

import re

import pytest

from tests.mutants.__main__ import table
from tests.mutants.catalogue import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_still_applies(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.before) == 1, "change tests/mutants/catalogue.py together with the source"
    compile(source.replace(mutant.before, mutant.after), mutant.file, "exec")
    assert mutant.killers
    for killer in mutant.killers:
        file, _, test = killer.partition("::")
        assert re.search(rf"^def {test.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE), killer


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_committed_table_is_that_of_the_list() -> None:
    assert (ROOT / "tests" / "mutants" / "README.md").read_text() == table(), "run `make mutants`"
