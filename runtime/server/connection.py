"""A connection whose client has to say in time what it wants, and to take in time what it gets.

uvicorn limits how long a connection stays idle after an answer, not how long a new one takes to send its first headers, nor
how slowly they may come, nor how long an answer waits to be taken; a few of those would use up every descriptor.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0
WRITE_SECONDS = 60.0


class PatientProtocol(H11Protocol):
    """Closes a connection whose headers are not complete :data:`HEADER_SECONDS` after it, or the request, began, or whose
    client has taken too little for :data:`WRITE_SECONDS` while a full buffer waited for it."""

    _deadline: asyncio.TimerHandle | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._watch()
        else:
            self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._relax()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(), which would wait until the buffer has been taken.
        self._patience = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._relax()
        super().resume_writing()

    def _relax(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _watch(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
