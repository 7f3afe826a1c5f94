"""README says what is: its table is the generated one, its tree names the folders, its commands exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
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


def test_relative_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / link).exists(), f"{page}: {link}"


def test_the_package_takes_every_file_that_is_not_python() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("runtime", "quant", "attention"):
        tracked = subprocess.run(
            ["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in tracked.split():
            if not name.endswith(".py"):
                inside = Path(name).relative_to(package)
                assert any(inside.match(pattern) for pattern in listed.get(package, [])), f"{name} is not packaged"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_flags_in_readme_are_known() -> None:
    parsers = [build_parser()]
    for parser in parsers:
        parsers += parser.commands().values()
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", README, re.DOTALL):
        for flag in re.findall(r"(?<!\S)(--[a-z0-9-]+)", block):
            assert flag in known, flag
