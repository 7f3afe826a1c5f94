"""What can go wrong, grouped by who has to act.

::

    Error
    ├── LoadError          the operator: this model cannot be loaded or served as asked
    ├── InvalidRequest     the client: this request can never be answered
    ├── Overloaded         the client, later: too much is queued
    └── EngineDead         the operator: a forward pass failed; the cause is chained

A message says what came, what is possible, and what to do.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def some(names: Collection[Any]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(str(name) for name in sorted(names, key=str)[:5])
    return shown + (", ..." if len(names) > 5 else "")


class Error(Exception):
    """Base of every error this package raises on purpose."""


class LoadError(Error):
    """The checkpoint, its configuration or the asked options cannot be loaded."""


class InvalidRequest(Error):
    """A prompt or a sampling parameter that can never be served; nothing else is affected."""


class Overloaded(Error):
    """The queue is full; the same request may succeed later."""


class EngineDead(Error):
    """The engine stopped after a failed forward pass; every live request got an error."""
