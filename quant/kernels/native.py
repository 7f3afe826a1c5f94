"""C beside Python: compiled by the machine's own compiler on first use, kept in the user's cache, loaded by ctypes.

Nothing is linked but the C library and OpenMP, so one build serves every version of torch and Python. A build is keyed by
everything that decides what it is (sources, flags, compiler) and moved into place at once, so that any number of
processes may build it together. The folder belongs to the user alone: what lies there is run.

Every function that takes arguments returns 0, or something else if there was no memory; :data:`watcher` hears of its calls.

Every source may include ``native.h``, which lies here. The attention package, which imports nothing of this one, is handed
:func:`build` by whoever selects its backend.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-Wno-psabi")
CACHE = Path("~/.cache/relinear")
HEADER = Path(__file__).with_name("native.h")


watcher: ContextVar[Callable[[Callable[..., int], tuple[Any, ...]], None] | None] = ContextVar("watcher", default=None)
"""Is handed every function that is called and its arguments, afterwards."""


class Library(ctypes.CDLL):
    """A compiled source."""

    def __getitem__(self, name: Any) -> Any:
        function = super().__getitem__(name)

        def call(*arguments: Any) -> int:
            result: int = function(*arguments)
            if arguments and (watch := watcher.get()) is not None:
                watch(function, arguments)
            return result

        return call


class CannotBuild(Exception):
    """Why there is no library, in a sentence for the user, with the remedy."""


class Source:
    """A C source, and headers beside it: built when something of it is first asked for."""

    def __init__(self, path: Path, *headers: str) -> None:
        self.path, self.headers = path, headers

    @cached_property
    def _built(self) -> ctypes.CDLL | str:
        return build(self.path, *(self.path.with_name(header) for header in self.headers))

    @property
    def refusal(self) -> str | None:
        """Why there is no :attr:`library`, in a sentence for the user."""
        return self._built if isinstance(self._built, str) else None

    @property
    def library(self) -> ctypes.CDLL:
        assert not isinstance(self._built, str), self._built
        return self._built

    @cached_property
    def widest(self) -> int:
        """The last of the instruction sets of ``native.h`` that this machine has, as ``detect`` counts them."""
        found: int = self.library.detect()
        return found


def build(source: Path, *headers: Path) -> ctypes.CDLL | str:
    """:func:`load`, or why it cannot: a refusal."""
    try:
        return load(source, *headers)
    except CannotBuild as error:
        return str(error)


def load(source: Path, *headers: Path) -> ctypes.CDLL:
    """The library of a C source, with OpenMP if the compiler has it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CannotBuild("no C compiler found: install one (cc) to use it")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    try:
        content = b"".join(path.read_bytes() for path in (source, *headers, HEADER))
    except OSError as error:
        raise CannotBuild(f"the installation is incomplete ({error}): install relinear again") from error
    folder = _cache_folder()
    errors = ""
    for flags in ((*FLAGS, "-fopenmp"), FLAGS):
        parts = [content, version, platform.machine().encode(), " ".join(flags).encode()]
        library = folder / f"{source.stem}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"
        for _ in range(2):
            errors = (
                "" if library.exists() else _compile([compiler, *flags, "-I", str(HEADER.parent), str(source)], library)
            )
            if not library.exists():
                break
            try:
                return Library(str(library))
            except OSError as error:  # a damaged file: build it once more
                errors = str(error)
                library.unlink(missing_ok=True)
    raise CannotBuild(f"{compiler} cannot build {source.name} for this machine ({errors}): try another compiler")


def _cache_folder() -> Path:
    try:
        folder = CACHE.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise CannotBuild(f"compiled kernels cannot be kept in {CACHE} ({error}): make it writable") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CannotBuild(f"others may write to {folder}, which keeps compiled kernels: chown it and chmod it to 700")
    return folder


def _compile(command: list[str], library: Path) -> str:
    """Builds ``library``, whole or not at all. Returns the compiler's first complaint."""
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                built.chmod(0o700)
                built.replace(library)
                return ""
    except OSError as error:
        raise CannotBuild(f"compiled kernels cannot be kept in {CACHE} ({error}): make it writable") from error
    return next((line for line in result.stderr.splitlines() if "error" in line), f"exit status {result.returncode}")
