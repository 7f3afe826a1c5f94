"""Imports run one way: runtime -> quant, attention; and importing a package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime", "quant", "attention")

FORBIDDEN = {
    "quant": ("runtime", "attention", "transformers", "tests", "benchmarks"),
    "attention": ("runtime", "quant", "tests", "benchmarks"),
    "runtime": ("tests", "benchmarks"),
    "quant/methods": ("quant.kernels", "quant.linear", "quant.registry"),
    "quant/kernels": ("quant.methods", "quant.linear", "quant.registry"),
}
"""Folder -> what no file below it may import, inside functions either."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_imports_against_the_direction(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            for forbidden in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path} imports {name}"


def test_only_one_file_of_attention_knows_transformers() -> None:
    knowing = {
        path.name for path in (ROOT / "attention").rglob("*.py") if "transformers" in map(first, imports_of(path))
    }
    assert knowing == {"hf.py"}


def test_weights_are_loaded_in_one_place() -> None:
    """``AutoModelForCausalLM.from_pretrained`` is called by the loader alone."""
    calling = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "AutoModelForCausalLM.from_pretrained(\n" in path.read_text()
    }
    assert calling == {"runtime/loader.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = (
        f"import {package}, sys; heavy = {{'triton', 'fastapi', 'transformers'}} & set(sys.modules); "
        "torch = sys.modules.get('torch'); "
        "assert not heavy, heavy; assert torch is None or not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_module_is_named_after_a_library_or_after_nothing() -> None:
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not names & {"torch", "triton", "transformers", "bitsandbytes", "utils", "common", "helpers", "misc"}


def first(name: str) -> str:
    return name.partition(".")[0]
