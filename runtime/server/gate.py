"""What every request has to pass before any route sees it: host, key, size.

It reads the whole body, within limits, and only then calls the application. Plain ASGI, because anything that wraps streaming
breaks the notice of a disconnect.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.server.errors import error_response

logger = logging.getLogger(__name__)

PUBLIC = frozenset({"/health"})
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
READ_SECONDS = 30.0
MAX_HEADER_BYTES = 32 * 1024
BODIES_AT_ONCE = 32
"""How many of the largest bodies all connections together may hold."""
DISCARD_SECONDS = 5.0
DISCARDED_BODIES = 16
"""How many times the largest body is read, and thrown away, of a request that is refused."""


@dataclass(frozen=True)
class Limits:
    """``hosts`` are the names by which the server may be addressed (empty: any), ``keys`` those that open it (empty: no key
    is asked for)."""

    hosts: Sequence[str] = LOOPBACK
    keys: Sequence[str] = ()
    max_body_bytes: int = 8 * 2**20
    read_seconds: float = READ_SECONDS


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, limits: Limits, on_refusal: Any = lambda status: None):
        self.app = app
        self.limits = limits
        self._keys = [key.encode() for key in limits.keys]
        self._on_refusal = on_refusal
        self._held = 0  # bytes of bodies that are being read or answered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here
        headers, parts = _Headers(scope["headers"]), _Parts()
        try:
            await self._pass(scope, receive, send, headers, parts)
        finally:
            self._held -= parts.nbytes

    async def _pass(self, scope: Any, receive: Any, send: Any, headers: _Headers, parts: _Parts) -> None:
        try:
            # The parser limits what it has to wait for; what arrives in one piece is limited here.
            if headers.nbytes > MAX_HEADER_BYTES:
                raise Refused(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes.")
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive, parts)
        except Refused as refusal:
            self._on_refusal(refusal.status)
            logger.warning("refused %s: %s", scope["path"], refusal.message)
            await self._discard(headers, receive, parts)
            response = error_response(refusal.status, refusal.message, refusal.code)
            response.headers["connection"] = "close"  # what is left of the body is not a request
            if refusal.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        if body is None:
            return
        await self.app(scope, _replay(body, receive), send)

    def _check_host(self, headers: _Headers) -> None:
        """A page of another site that resolves to this address (DNS rebinding) still sends its own name."""
        hosts = headers.all(b"host")
        if len(hosts) != 1:
            raise Refused(400, f"exactly one Host header is needed, not {len(hosts)}.")
        name = hosts[0].decode("latin-1").lower()
        bare = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self.limits.hosts and bare not in self.limits.hosts:
            raise Refused(403, f"Host {bare[:64]!r} is not served here; --allowed-hosts names those that are.")

    def _check_key(self, path: str, headers: _Headers) -> None:
        if not self._keys or path in PUBLIC:
            return
        given = headers.all(b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Every key is compared, whatever the first one says: the time must not tell which was nearly right.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Refused(401, "a valid key is needed: Authorization: Bearer KEY.", "invalid_api_key")

    async def _read(self, headers: _Headers, receive: Any, parts: _Parts) -> bytes | None:
        """The body; ``None`` if the client went away before its end."""
        if headers.all(b"content-encoding"):
            raise Refused(415, "compressed bodies are not accepted.")
        limit = self.limits.max_body_bytes
        too_large = Refused(413, f"the body is larger than {limit} bytes (--max-body-bytes).")
        length = headers.all(b"content-length")
        if length and length[0].isdigit() and int(length[0][:20]) > limit:
            raise too_large
        too_many = Refused(503, "the server holds as many bytes of requests as it may. Try again later.")
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                while parts.more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    self._held += parts.append(message.get("body", b""))
                    parts.more = message.get("more_body", False)
                    if parts.nbytes > limit:
                        raise too_large
                    if parts.more and self._held > BODIES_AT_ONCE * limit:
                        raise too_many
        except TimeoutError:
            raise Refused(408, f"the body was not complete after {self.limits.read_seconds:g} s.") from None
        return parts.whole()

    async def _discard(self, headers: _Headers, receive: Any, parts: _Parts) -> None:
        """Read on, within limits: closing over bytes that nobody read resets the connection before the client knows why."""
        if headers.all(b"expect"):
            return  # it asked before sending
        left = DISCARDED_BODIES * self.limits.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while parts.more and left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    parts.more = message.get("more_body", False)


class _Parts:
    """Of a body, of which there may be ``more``."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.nbytes = 0
        self.more = True

    def append(self, part: bytes) -> int:
        self._parts.append(part)
        self.nbytes += len(part)
        return len(part)

    def whole(self) -> bytes:
        return b"".join(self._parts)


class _Headers:
    def __init__(self, raw: Sequence[tuple[bytes, bytes]]):
        self._raw = raw

    @property
    def nbytes(self) -> int:
        return sum(len(key) + len(value) for key, value in self._raw)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self._raw if key.lower() == name]


def _replay(body: bytes, receive: Any) -> Any:
    """``receive`` that gives the body once and then whatever comes, which is the disconnect."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return pending.pop() if pending else await receive()

    return replayed
