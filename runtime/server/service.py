"""What the routes share: from a request's text to a stream of the engine, and back to the client.

Tokenising, templates and grammars run on threads, never on the event loop; whatever happens to a response, its stream is
closed, which frees its blocks.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import StreamingResponse

from runtime.engine import Engine
from runtime.errors import EngineDead, Error, InvalidRequest
from runtime.grammar import Matcher
from runtime.request import Delta, SamplingParams
from runtime.server.conversation import Conversation
from runtime.server.errors import ModelNotFound, NotReady, describe, error_body
from runtime.server.metrics import Metrics
from runtime.server.options import ServerOptions
from runtime.server.reply import ReplyFormat
from runtime.server.template import RENDER_SECONDS, load_template, render
from runtime.server.tokens import TokenTable
from runtime.stream import Stream
from runtime.worker import Worker, failure_of

logger = logging.getLogger(__name__)

PING_SECONDS = 15.0
COMPILE_SECONDS = 20.0
MAX_CHARACTERS_PER_TOKEN = 512
"""More than the longest runs of spaces or dashes that vocabularies have."""
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the schema of a route that answers with events if it is asked to."""

T = TypeVar("T")
Pieces = list[tuple[int, Delta]]


class Disconnected(Exception):
    """The client has gone; nobody reads the answer."""


class Service:
    """One served model."""

    def __init__(self, worker: Worker, options: ServerOptions, metrics: Metrics):
        self.worker = worker
        self.options = options
        self.metrics = metrics
        self.name = options.served_model_name or worker.config.model
        self.template = load_template(options.chat_template)
        self.created = int(time.time())
        self._tokenizer: Any = None
        self._tokens: TokenTable | None = None
        self._reply_format = ReplyFormat.of_names(options.tool_call_parser, options.reasoning_parser)
        # One thread: a fast tokenizer is not to be used from two at once.
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._slow = ThreadPoolExecutor(4, thread_name_prefix="compile")

    @property
    def engine(self) -> Engine:
        """The loaded engine. Raises :class:`NotReady`."""
        if self.worker.error is not None:
            raise EngineDead(f"the engine stopped: {self.worker.error}")
        if self.worker.draining:
            raise NotReady("the server is shutting down.")
        if self.worker.engine is None:
            raise NotReady("the model is loading.")
        return self.worker.engine

    @property
    def tokenizer(self) -> Any:
        """A tokenizer that the engine's thread does not use. Raises :class:`InvalidRequest` if there is none."""
        if self.engine.tokenizer is None:
            raise InvalidRequest("this server has no tokenizer (--skip-tokenizer-init): only /generate with input_ids.")
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(self.engine.tokenizer)
        return self._tokenizer

    @property
    def tokens(self) -> TokenTable:
        """What single tokens stand for. Raises :class:`InvalidRequest` if there is no tokenizer."""
        if self._tokens is None:
            self._tokens = TokenTable(self.tokenizer)
        return self._tokens

    def require_model(self, name: str | None) -> None:
        if name is not None and name not in (self.name, self.worker.config.model):
            raise ModelNotFound(f"model {name[:256]!r} is not served here; {self.name!r} is.")

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling parameters for fields that a request leaves out."""
        return self.engine.sampling_defaults if self.options.sampling_defaults == "model" else {}

    # From text to the engine --------------------------------------------------------------------------------------

    async def _on(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    async def encode(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """Token ids of a prompt. Raises :class:`InvalidRequest`."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self.tokenizer
        self._require_short(prompt)
        try:
            return await self._on(self._texts, lambda: list(tokenizer(prompt, add_special_tokens=special)["input_ids"]))
        except (TypeError, ValueError, UnicodeError) as error:
            raise InvalidRequest(f"the prompt cannot be tokenised: {error}") from error

    async def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids. Raises :class:`InvalidRequest`."""
        tokenizer = self.tokenizer
        if any(not 0 <= token < self.engine.vocabulary for token in tokens):
            raise InvalidRequest(f"tokens must be 0 to {self.engine.vocabulary - 1}.")
        decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        return await self._on(self._texts, lambda: str(decode(tokens, skip_special_tokens=skip_special_tokens)))

    async def flush_cache(self) -> None:
        """Forget cached prefixes. Raises :class:`NotReady` or :class:`EngineDead`."""
        _ = self.engine  # which raises while there is none
        await self.worker.call(Engine.flush_cache)

    def _require_short(self, prompt: str) -> None:
        """Refuse what cannot fit before spending time on it."""
        most = self.engine.max_model_len * MAX_CHARACTERS_PER_TOKEN
        if len(prompt) > most:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} characters; {self.engine.max_model_len} tokens cannot hold more than {most}."
            )

    async def reply_format(self) -> ReplyFormat:
        """How this model marks thoughts and calls."""
        if self._reply_format is None:
            tokenizer, model_type = self.tokenizer, self.engine.loaded.plan.config.model_type
            self._reply_format = await self._on(self._slow, lambda: ReplyFormat.of_model(tokenizer, model_type))
        return self._reply_format

    async def converse(self, asked: Conversation) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and as token ids. Raises :class:`InvalidRequest`."""
        tokenizer, rendering = self.tokenizer, asked.rendering()
        try:
            async with asyncio.timeout(RENDER_SECONDS + 1):
                text = await self._on(self._slow, lambda: render(tokenizer, self.template, **rendering))
        except TimeoutError:
            raise InvalidRequest("the chat template did not end in time with these messages.") from None
        return text, await self.encode(text, special=False)

    async def compile(self, params: SamplingParams) -> Matcher | None:
        """The grammar of a request. Raises :class:`InvalidRequest`."""
        wanted, engine = params.structured_outputs, self.engine
        if wanted is None:
            return None
        if engine.tokenizer is None:
            raise InvalidRequest("structured_outputs need a tokenizer, and this server has none.")
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await self._on(self._slow, lambda: engine.grammars.compile(wanted))
        except TimeoutError:
            raise InvalidRequest(
                f"structured_outputs: the grammar was not compiled after {COMPILE_SECONDS:g} s."
            ) from None

    async def submit(self, prompts: Sequence[list[int]], params: SamplingParams) -> Stream:
        matcher = await self.compile(params)
        stream = await self.worker.submit(prompts, params, matcher)
        self.metrics.prompts(stream)
        if self.options.log_requests:
            lengths = [len(prompt) for prompt in prompts]
            logger.info("request: %d prompts of %s tokens, %s", len(prompts), lengths[:8], self._logged(params))
        return stream

    @staticmethod
    def _logged(params: SamplingParams) -> str:
        """The numbers of a request; its texts stay out of the log."""
        names = ("n", "max_tokens", "temperature", "top_p", "top_k", "seed")
        return ", ".join(f"{name} {getattr(params, name)}" for name in names)

    # And back -----------------------------------------------------------------------------------------------------

    async def collect(self, request: Request, stream: Stream) -> list[list[Delta]]:
        """The whole answers, ``[prompt][sample]``. Raises what ended one of them, or :class:`Disconnected`."""
        answers: dict[tuple[int, int], Delta] = {}
        reading = asyncio.ensure_future(self._read_all(stream, answers))
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait((reading, gone), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                self.metrics.aborted("disconnect")
                raise Disconnected
            reading.result()
        finally:
            reading.cancel()
            gone.cancel()
            stream.close()
        samples = range(stream.params.n)
        return [[answers[place, index] for index in samples] for place in range(len(stream.prompts))]

    @staticmethod
    async def _read_all(stream: Stream, answers: dict[tuple[int, int], Delta]) -> None:
        while pieces := await stream.read():
            for place, delta in pieces:
                if failure := failure_of(delta):
                    raise failure
                if (place, delta.index) in answers:
                    answers[place, delta.index].merge(delta)
                else:
                    answers[place, delta.index] = delta

    def events(
        self, stream: Stream, chunk: Callable[[int, Delta], list[Any]], last: Callable[[], list[Any]]
    ) -> StreamingResponse:
        """Server-sent events: ``chunk`` for each piece, then ``last``, then ``[DONE]``."""
        return _Events(self._lines(stream, chunk, last), stream, self.metrics)

    @staticmethod
    async def _lines(stream: Stream, chunk: Callable[[int, Delta], list[Any]], last: Callable[[], list[Any]]) -> Any:
        """What is there at one time is sent at once, the end with the last piece."""
        lines: list[bytes] = []
        try:
            while not stream.ended:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        pieces = await stream.read()
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                for place, delta in pieces:
                    if failure := failure_of(delta):
                        raise failure
                    lines += map(event, chunk(place, delta))
                if lines and not stream.ended:
                    yield b"".join(lines)
                    lines = []
            lines += [*map(event, last()), b"data: [DONE]\n\n"]
        except Error as error:
            lines.append(event(error_body(*describe(error))))
        yield b"".join(lines)


class _Events(StreamingResponse):
    """Closes its stream however it ends."""

    def __init__(self, lines: Any, stream: Stream, metrics: Metrics):
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._stream = stream
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._stream.left and self._stream.error is None:
                self._metrics.aborted("disconnect")
            self._stream.close()


def event(data: Any) -> bytes:
    return b"data: %b\n\n" % to_json(data)


async def _disconnect(request: Request) -> None:
    receive: Callable[[], Awaitable[Any]] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass
