"""README says what is: its table is the generated one, its tree names the folders, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.cli import build_parser
from tests.formats import readme_with_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_formats_is_the_generated_one() -> None:
    assert readme_with_table(README) == README, "run: python -m tests.formats --write"


def test_the_tree_names_every_module() -> None:
    tree = README.partition("## The house")[2]
    for package in ("runtime", "quant", "attention"):
        for path in (ROOT / package).glob("*.py"):
            if not path.stem.startswith("__"):
                assert re.search(rf"\b{path.stem}\b", tree), f"{package}/{path.name} is not in README's tree"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_flags_in_readme_are_known() -> None:
    parser = build_parser()
    known = {flag for action in parser._every_action() for flag in action.option_strings}
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", README, re.DOTALL):
        for flag in re.findall(r"(?<!\S)(--[a-z-]+)", block):
            assert flag in known, flag
