"""The Pythons of other environments, for peers that cannot live in this one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def add_python_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=PYTHON", help="who has which package")


def python_of(package: str, entries: list[str]) -> str:
    """The Python that was named for ``package``, or this one."""
    return dict(entry.split("=", 1) for entry in entries).get(package, sys.executable)


def has_package(python: str, package: str) -> bool:
    find = f"import sys; from importlib.util import find_spec; sys.exit(find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", find], cwd=ROOT, check=False).returncode == 0
