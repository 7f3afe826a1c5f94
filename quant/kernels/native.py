"""C beside Python: compiled by the machine's own compiler on first use, kept in the user's cache, loaded by ctypes.

Nothing is linked but the C library and OpenMP, so one build serves every version of torch and Python. A build is keyed by
everything that decides what it is (sources, flags, compiler) and moved into place at once, so that any number of
processes may build it together. The folder belongs to the user alone: what lies there is run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-Wno-psabi")
CACHE = Path("~/.cache/relinear")


class CannotBuild(Exception):
    """Why there is no library, in a sentence for the user, with the remedy."""


def load(source: Path, *headers: Path) -> ctypes.CDLL:
    """The library of a C source, with OpenMP if the compiler has it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CannotBuild("no C compiler found: install one (cc) to use it")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    content = b"".join(path.read_bytes() for path in (source, *headers))
    folder = _cache_folder()
    for flags in ((*FLAGS, "-fopenmp"), FLAGS):
        key = hashlib.sha256(b"\0".join([content, version, " ".join(flags).encode()])).hexdigest()[:16]
        library = folder / f"{source.stem}-{key}.so"
        errors = "" if library.exists() else _compile([compiler, *flags, str(source)], library)
        if library.exists():
            return ctypes.CDLL(str(library))
    raise CannotBuild(f"{compiler} cannot compile {source.name}, a newer one might ({errors})")


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
