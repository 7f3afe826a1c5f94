"""The one thread that turns the engine, seen from an event loop.

Everything that touches the engine runs on that thread: other threads hand it functions, which it calls between two steps.
So an abort takes effect within one step. Answers go back to the loop once a step, or :data:`PIECES_PER_SECOND` times where
steps are shorter than that, but for beginnings and ends, which go at once: every piece that is sent keeps the interpreter
from the next step.

If the engine cannot be loaded or stops, every stream gets the error and ``on_end`` is called: nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import EngineDead, Error, InvalidRequest, Overloaded
from runtime.grammar import FIELD, Matcher
from runtime.request import Delta, FinishReason, SamplingParams
from runtime.stream import Stream

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
"""How long an idle thread sleeps before it says again that it is alive."""
PIECES_PER_SECOND = 60
"""As many as a screen shows; nobody sees more."""


class Worker:
    """Loads the engine of ``config`` on a thread and serves streams from it.

    ``on_ready()`` and ``on_end(error)`` are called on the event loop, ``on_delta(stream, delta, when)`` as well, for what
    each step gave, with the time (``time.monotonic``) of the step's end.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_ready: Callable[[], None] = lambda: None,
        on_end: Callable[[Exception], None] = lambda error: None,
        on_delta: Callable[[Stream, Delta, float], None] = lambda stream, delta, when: None,
    ):
        self.config = config
        self.engine: Engine | None = None
        self.error: Exception | None = None
        self.heartbeat = time.monotonic()
        self.streams: set[Stream] = set()
        self.draining = False
        self._on_ready, self._on_end, self._on_delta = on_ready, on_end, on_delta
        self._inbox: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._routes: dict[int, tuple[Stream, int]] = {}
        self._outbox: deque[tuple[Stream, int, Delta, float]] = deque()
        self._delivery: asyncio.TimerHandle | None = None
        self._delivered = 0.0
        self._announced = False
        self._calls: set[asyncio.Future[Any]] = set()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # On the event loop --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load; to be called on the event loop that will read the streams."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Leave the thread after its current step; streams that are still open end with an error."""
        self._stopping = True
        self._fail_all(EngineDead("the server is shutting down; the answer is incomplete."))
        self._inbox.put(lambda engine: None)

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; ``False`` if it has not come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def silent_seconds(self) -> float:
        """Since the thread last finished a step, or said that it is idle."""
        return time.monotonic() - self.heartbeat

    def require_room(self, samples: int = 1) -> None:
        """Raise :class:`Overloaded` if this many more would exceed the queue: worth asking before any work is done."""
        if self.engine is not None:
            self.engine.require_room(samples)

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, matcher: Matcher | None = None
    ) -> Stream:
        """Queue prompts, all or none. Raises what :meth:`Engine.add` raises; the caller closes the stream."""
        if self.error is not None:
            raise EngineDead(str(self.error))
        self.require_room(len(prompts) * params.n)
        stream = Stream(self, prompts, params, matcher, self._loop.create_future())
        self.streams.add(stream)
        self._inbox.put(lambda engine: self._add(engine, stream))
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run a function on the engine's thread, between two steps. Raises :class:`EngineDead`."""
        if self.error is not None or self._stopping:
            raise EngineDead(f"the engine stopped: {self.error or 'the server is shutting down'}")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def finish(result: Any) -> None:
            if not future.done():
                future.set_result(result)

        def run(engine: Engine) -> None:
            result = function(engine)
            self._post(lambda: finish(result))

        self._inbox.put(run)
        return await future

    def forget(self, stream: Stream) -> None:
        self.streams.discard(stream)
        self._inbox.put(lambda engine: self._abort(engine, stream))

    # On the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self.engine = Engine(self.config)
            self.heartbeat = time.monotonic()
            self._post(self._on_ready)
            while not self._stopping:
                self._take(engine)
                if engine.has_work:
                    self._send(engine.step())
                self.heartbeat = time.monotonic()
                engine.require_alive()
        except Exception as error:
            if not isinstance(error, Error):
                logger.critical("the engine's thread failed", exc_info=error)
            cause = error
            self._post(lambda: self._end(cause))

    def _take(self, engine: Engine) -> None:
        """Do what was asked for; wait for something if there is nothing else to do."""
        try:
            self._inbox.get(block=not engine.has_work, timeout=IDLE_SECONDS)(engine)
            while True:
                self._inbox.get_nowait()(engine)
        except queue.Empty:
            return

    def _add(self, engine: Engine, stream: Stream) -> None:
        if stream.closed:
            return
        uids: list[int] = []
        try:
            for prompt in stream.prompts:
                uids.append(engine.add(prompt, stream.params, stream.matcher))
        except Exception as error:
            refusal = error
            if not isinstance(error, Error):
                logger.error("a request could not be queued", exc_info=error)
            for uid in uids:
                engine.abort(uid)
            self._post(lambda: stream.fail(refusal))
            return
        self._routes.update({uid: (stream, place) for place, uid in enumerate(uids)})
        self._post(stream.accept)

    def _abort(self, engine: Engine, stream: Stream) -> None:
        for uid in [uid for uid, (owner, _) in self._routes.items() if owner is stream]:
            del self._routes[uid]
            engine.abort(uid)

    def _send(self, deltas: list[Delta]) -> None:
        now, urgent = time.monotonic(), False
        for delta in deltas:
            if delta.uid in self._routes:
                stream, place = self._routes[delta.uid]
                self._outbox.append((stream, place, delta, now))
                urgent |= not stream.begun or delta.finish_reason is not None
                stream.begun = True
        if urgent:
            self._post(self._deliver)
        elif self._outbox and not self._announced:
            self._announced = True
            self._post(self._deliver_soon)

    def _post(self, function: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            self._stopping = True  # the loop is closed: the process is about to end

    # Back on the event loop ---------------------------------------------------------------------------------------

    def _deliver_soon(self) -> None:
        """Deliver what is in the outbox, now or when it is time for the next pieces."""
        if self._delivery is None:
            due = self._delivered + 1 / PIECES_PER_SECOND
            self._delivery = self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None
        self._delivered = self._loop.time()
        self._announced = False  # before the outbox is emptied: what comes now is announced again
        while self._outbox:
            stream, place, delta, when = self._outbox.popleft()
            self._on_delta(stream, delta, when)
            stream.deliver(place, delta)

    def _end(self, error: Exception) -> None:
        self._deliver()
        self.error = error
        self._fail_all(EngineDead(str(error)))
        self._on_end(error)

    def _fail_all(self, error: EngineDead) -> None:
        """Whoever waits for the engine's thread gets ``error``."""
        for stream in list(self.streams):
            stream.fail(error)
        for call in list(self._calls):
            if not call.done():
                call.set_exception(error)


def failure_of(delta: Delta) -> Exception | None:
    """The exception that stands for a piece which ended badly."""
    if delta.finish_reason is FinishReason.ABORT:
        return Overloaded(delta.error or "aborted")
    if delta.finish_reason is not FinishReason.ERROR:
        return None
    message = delta.error or "failed"
    return InvalidRequest(message) if message.startswith(f"{FIELD}:") else Error(message)
