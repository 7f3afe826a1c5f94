"""Connections, and how much of the server one may hold: time to say what it wants, time to take its answer, a descriptor.

uvicorn limits how long a connection stays idle after an answer, but not how long a new one takes to send its first headers, how
slowly they may come, or how long what has been written waits for a client that does not read; and it counts connections without
refusing any. A few of those clients would use up every descriptor.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.errors import error_response

logger = logging.getLogger(__name__)

HEADER_SECONDS = 30.0
WRITE_SECONDS = 60.0
LINGER_SECONDS = 1.0
MAX_CONNECTIONS = 1024
RESERVED_DESCRIPTORS = 32
"""For the listener, the log, the event loop, and connections that are accepted but not yet counted or refused but not gone."""
ACCEPTED_AT_ONCE = 8
"""Before any of them is counted; asyncio accepts in one go as many as its backlog says."""
LISTEN_BACKLOG = 1024


class PatientProtocol(H11Protocol):
    """Closes a connection whose headers are not complete :data:`HEADER_SECONDS` after it, or the request, began, and one that
    takes nothing of what is written for :data:`WRITE_SECONDS`.

    There are at most ``max_connections``. One more takes the place of the one that has been idle for longest; if all are at
    work, it is answered 503.
    """

    max_connections = MAX_CONNECTIONS
    _headers_due: asyncio.TimerHandle | None = None
    _writing_due: asyncio.TimerHandle | None = None
    _quiet_since = 0.0
    _answered = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._quiet_since = time.monotonic()
        if len(self.connections) > self.max_connections and not self._make_room():
            self._refuse()
            return
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        if self._answered or self.transport.is_closing():
            return
        super().data_received(data)
        if self._answered:
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._watch_headers()
        else:
            self._unwatch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._unwatch_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._quiet_since = time.monotonic()
        if self.transport.is_closing():
            self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_headers()
        self._unwatch_writing()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _unwatch_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _give_up(self) -> None:
        self.transport.close()
        self._watch_writing()

    def _watch_writing(self) -> None:
        """Begins where nothing more is written until the client has read: at the high-water mark, or before the end."""
        if self._writing_due is None:
            before = self.transport.get_write_buffer_size()
            self._writing_due = self.loop.call_later(WRITE_SECONDS, self._require_progress, before)

    def _unwatch_writing(self) -> None:
        if self._writing_due is not None:
            self._writing_due.cancel()
            self._writing_due = None

    def _require_progress(self, before: int) -> None:
        self._writing_due = None
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before > 0:
            logger.warning("dropped a client that took nothing for %g s; %d bytes waited", WRITE_SECONDS, waiting)
            self.transport.abort()  # close() would wait for them
        elif waiting:
            self._watch_writing()

    @property
    def _quiet(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def _make_room(self) -> bool:
        """Close the connection that has had nothing to do for longest; ``False`` if every other one is at work."""
        others = [other for other in self.connections if other is not self and isinstance(other, PatientProtocol)]
        oldest = min((o for o in others if o._quiet), key=lambda other: other._quiet_since, default=None)
        if oldest is not None:
            oldest.transport.abort()
            self.connections.discard(oldest)  # now, not when the loop comes to it: a burst counts right
        return oldest is not None

    def _refuse(self) -> None:
        logger.warning("refused a connection: %d are at work", self.max_connections)
        self.connections.discard(self)
        self._answer(503, f"all {self.max_connections} connections are in use. Try again later.")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered as everything else is."""
        self._answer(400, msg)

    def _answer(self, status: int, message: str) -> None:
        """The last words on this connection, past the application."""
        response = error_response(status, message)
        head = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode(), b"connection: close"]
        head += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
        self._answered = True
        self._unwatch_headers()
        if self.transport.can_write_eof():
            self.transport.write_eof()  # what it still sends is read: closing over it would reset the connection
            self._headers_due = self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        else:
            self._give_up()


def limit_connections() -> None:
    """Allow as many connections as there are descriptors for, once the process may have as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        soft = MAX_CONNECTIONS + 2 * RESERVED_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
        soft = max(soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    PatientProtocol.max_connections = max(1, min(MAX_CONNECTIONS, soft - RESERVED_DESCRIPTORS))
    if PatientProtocol.max_connections < MAX_CONNECTIONS:
        logger.warning(
            "%d descriptors (ulimit -n) are enough for %d connections at once; %d want %d",
            soft, PatientProtocol.max_connections, MAX_CONNECTIONS, MAX_CONNECTIONS + RESERVED_DESCRIPTORS,
        )  # fmt: skip


def explain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For the loop's exceptions: without a descriptor for a new connection it waits for a second, and a sentence is enough."""
    error, message = context.get("exception"), str(context.get("message"))
    if isinstance(error, OSError) and "accept" in message:
        logger.error("no new connection could be accepted, trying again in a second: %s (see ulimit -n)", error)
    elif not (
        isinstance(error, ValueError) and "_start_serving" in message
    ):  # that second ended after the listener was closed
        loop.default_exception_handler(context)
