"""The table of complaints is complete, true to the list, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.complaints.catalogue import COMPLAINTS, HERE, Complaint, table


def test_all_are_there_and_the_committed_table_is_that_of_the_list() -> None:
    assert [complaint.number for complaint in COMPLAINTS] == list(range(1, 29))
    assert (HERE / "README.md").read_text() == table(), "run python -m tests.complaints.catalogue --write"


@pytest.mark.parametrize("complaint", COMPLAINTS, ids=lambda complaint: str(complaint.number))
def test_what_proves_it_exists(complaint: Complaint) -> None:
    assert complaint.tests
    for test in complaint.tests:
        file, _, function = test.partition("::")
        source = (Path(__file__).parents[1] / file).read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), test
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", where) for where in complaint.where)


def test_every_test_of_this_folder_answers_a_complaint() -> None:
    named = {test for complaint in COMPLAINTS for test in complaint.tests}
    for file in sorted(HERE.glob("test_*.py")):
        if file.name == Path(__file__).name:
            continue
        for function in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE):
            assert f"complaints/{file.name}::{function}" in named
