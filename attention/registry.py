"""Which attention backend runs a model: names in order of preference, made only when their turn comes.

A backend is asked about every spec of the model, before any weight is read. Its refusal is kept, so that the report can
say why a faster backend was passed over; a backend asked for by name is never replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from attention.base import AttentionBackend, AttentionError, AttentionSpec, UnsupportedAttention


def _reference() -> AttentionBackend:
    from attention.reference import ReferenceBackend

    return ReferenceBackend()


def _paged() -> AttentionBackend:
    from attention.paged import PagedBackend

    return PagedBackend()


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {"paged": _paged, "reference": _reference}  # preferred first


class Selection(NamedTuple):
    """The backend that will run, and what those preferred to it answered."""

    backend: AttentionBackend
    refusals: dict[str, str]


def select(specs: Sequence[AttentionSpec], device: torch.device, asked: str | None = None) -> Selection:
    """The first backend that refuses none of ``specs`` on ``device``, or exactly the one ``asked`` for by name."""
    if asked is not None and asked not in BACKENDS:
        raise AttentionError(f"unknown attention backend {asked!r}; known: {', '.join(BACKENDS)}")
    refusals: dict[str, str] = {}
    for name in [asked] if asked is not None else BACKENDS:
        backend = BACKENDS[name]()
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
