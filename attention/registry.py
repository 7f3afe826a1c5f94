"""Which attention backend runs a model: names in order of preference, made only when their turn comes.

A backend is asked about every spec of the model, before any weight is read. Its refusal is kept, so that the report can
say why a faster backend was passed over; a backend asked for by name is never replaced by another.

Kernels in C have to be compiled, by the same compiler and into the same folder as those of the quant package, which this one
does not import. So the caller of :func:`select` hands over what compiles them; without it they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from attention.base import AttentionBackend, AttentionError, AttentionSpec, UnsupportedAttention

if TYPE_CHECKING:
    from attention.cpu import Build


def _paged(build: Build | None) -> AttentionBackend:
    from attention.paged import PagedBackend

    return PagedBackend()


def _cpu(build: Build | None) -> AttentionBackend:
    from attention.cpu import CpuBackend

    return CpuBackend(build)


def _reference(build: Build | None) -> AttentionBackend:
    from attention.reference import ReferenceBackend

    return ReferenceBackend()


Maker = Callable[["Build | None"], AttentionBackend]
BACKENDS: dict[str, Maker] = {"paged": _paged, "cpu": _cpu, "reference": _reference}
"""Preferred first."""


class Selection(NamedTuple):
    """The backend that will run, and what those preferred to it answered."""

    backend: AttentionBackend
    refusals: dict[str, str]


def select(
    specs: Sequence[AttentionSpec], device: torch.device, asked: str | None = None, build: Build | None = None
) -> Selection:
    """The first backend that refuses none of ``specs`` on ``device``, or exactly the one ``asked`` for by name.

    ``build`` compiles kernels that are in C (:data:`attention.cpu.Build`).
    """
    if asked is not None and asked not in BACKENDS:
        raise AttentionError(f"unknown attention backend {asked!r}; known: {', '.join(BACKENDS)}")
    refusals: dict[str, str] = {}
    for name in [asked] if asked is not None else BACKENDS:
        backend = BACKENDS[name](build)
        refusal = _refusal(backend, specs, device)
        if refusal is None:
            return Selection(backend, refusals)
        refusals[name] = refusal
    reasons = "\n".join(f"  {name}: {refusal}" for name, refusal in refusals.items())
    raise UnsupportedAttention(f"no attention backend can run this model on {device}:\n{reasons}")


def _refusal(backend: AttentionBackend, specs: Sequence[AttentionSpec], device: torch.device) -> str | None:
    for spec in dict.fromkeys(specs):
        if (refusal := backend.refuses(spec, device)) is not None:
            return f"{refusal} (asked for {spec})"
    return None
