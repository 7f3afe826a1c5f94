"""The server as a process: bind, load, serve, drain, and an exit status that tells the truth.

0 after a signal and an orderly end    1 if it could not start    70 if the engine stopped or hung
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from runtime.config import EngineConfig
from runtime.errors import Error, LoadError
from runtime.server.app import build_app
from runtime.server.connection import ACCEPTED_AT_ONCE, LISTEN_BACKLOG, PatientProtocol, explain, limit_connections
from runtime.server.gate import MAX_HEADER_BYTES
from runtime.server.metrics import Metrics
from runtime.server.options import ServerOptions
from runtime.worker import Worker

logger = logging.getLogger("relinear")

ENGINE_FAILED = 70
KEEP_ALIVE_SECONDS = 30
SEND_BUFFER_BYTES = 2**17
"""Of a connection, in the kernel, which doubles it. Left to itself it grows to megabytes, and while a client reads those
nothing here would know that it reads."""
CLOSE_SECONDS = 5.0


def code_may_change(config: EngineConfig) -> bool:
    """Whether the code of a Hub repository is the newest one, which may be another tomorrow."""
    on_the_hub = "/" in config.model and not Path(config.model).expanduser().is_dir()
    return on_the_hub and re.fullmatch(r"[0-9a-f]{40}", config.revision or "") is None


class EscapingFormatter(logging.Formatter):
    """Shows control characters as escapes, so that nothing a client sends can forge a line or colour a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: ascii(c[0])[1:-1], record.message)
        return super().formatMessage(record)


def serve(config: EngineConfig, options: ServerOptions) -> int:
    """Serve until told to stop; the exit status. Raises :class:`Error` if it cannot even begin."""
    process = _Process(config, options)
    _log_to_stderr(options.log_level)
    faulthandler.enable()
    return asyncio.run(process.run())


class _Process:
    def __init__(self, config: EngineConfig, options: ServerOptions):
        self.options = options
        self.status = 0
        metrics = Metrics(options.served_model_name or config.model)
        self.worker = Worker(config, self._ready, self._ended, metrics.delta)
        metrics.watch(self.worker)
        settings = uvicorn.Config(
            build_app(self.worker, options, metrics),
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile_password=options.ssl_keyfile_password,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=options.ssl_cert_reqs,
            ssl_ciphers=options.ssl_ciphers,
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(CLOSE_SECONDS),
        )
        try:
            if options.ssl_certfile is not None:  # without a password that is needed, OpenSSL would ask the terminal
                password = (options.ssl_keyfile_password or "").encode()
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                    options.ssl_certfile, options.ssl_keyfile, password
                )
            settings.load()
        except OSError as error:
            raise LoadError(f"https (--ssl-keyfile, --ssl-certfile, ...): {error}") from error
        self.server = _Server(settings, self._asked_to_end)
        self.listener = _bind(options)
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        limit_connections()
        asyncio.get_running_loop().set_exception_handler(explain)
        self.listener.listen()
        logger.info("listening: %s; loading %s", self._address(), self.worker.config.model)
        self.worker.start()
        watchdog = asyncio.create_task(self._watch())
        await self.server.serve(sockets=[self.listener])
        watchdog.cancel()
        self.worker.stop()
        if not self.worker.join(CLOSE_SECONDS):
            # It is inside a forward pass or still loading; torch does not survive the interpreter's end there.
            logging.shutdown()
            os._exit(self.status)
        return self.status

    def _ready(self) -> None:
        engine = self.worker.engine
        assert engine is not None
        print(engine.report + "\n", file=sys.stderr, flush=True)
        defaults = engine.sampling_defaults if self.options.sampling_defaults == "model" else {}
        source = "generation_config.json" if defaults else "OpenAI's defaults"
        logger.info("sampling defaults: %s (%s)", defaults or "temperature 1, top_p 1", source)
        if engine.config.trust_remote_code:
            advice = "; name a commit with --revision" if code_may_change(engine.config) else ""
            logger.warning("the checkpoint's own Python code runs in this process (--trust-remote-code)%s", advice)
        if not self.options.loopback and not (self.options.api_key or self.options.api_key_file):
            logger.warning("anybody who reaches %s can use this server: set --api-key", self.options.host)
        # The model and the libraries stay. Looking through their objects again would hold every answer up, for 0.1 s and more.
        gc.collect()
        gc.freeze()
        logger.info("ready: %s", self._address())

    def _address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"{self.options.scheme}://[{host}]:{port}" if ":" in host else f"{self.options.scheme}://{host}:{port}"

    def _ended(self, error: Exception) -> None:
        """The engine could not be loaded, or stopped."""
        self.status = 1 if isinstance(error, LoadError) else ENGINE_FAILED
        if isinstance(error, Error):
            print(f"relinear: {error}", file=sys.stderr, flush=True)
        else:
            logger.critical("the engine stopped: %s: %s", type(error).__name__, error)
        self.server.should_exit = True

    def _asked_to_end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.worker.stop()
            self.server.should_exit = True

    async def _drain(self) -> None:
        """Refuse new work, let what runs end, then end it."""
        self.worker.draining = True
        seconds = self.options.shutdown_timeout
        logger.info(
            "draining %d answers for at most %g s; a second signal ends them", len(self.worker.streams), seconds
        )
        try:
            async with asyncio.timeout(seconds):
                while self.worker.streams:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            logger.warning("%d answers were cut short", len(self.worker.streams))
        self.worker.stop()
        self.server.should_exit = True

    async def _watch(self) -> None:
        """A hanging forward pass cannot be interrupted; whoever supervises this process can start it again.

        Time in which this loop stood still as well, with the whole process, is not held against the engine.
        """
        while True:
            before = time.monotonic()
            await asyncio.sleep(1)
            stopped = time.monotonic() - before - 1
            if stopped > 1:
                logger.warning("this process stood still for %.0f s", stopped)
                self.worker.heartbeat = min(self.worker.heartbeat + stopped, time.monotonic())
            if self.worker.engine is not None and self.worker.silent_seconds > self.options.watchdog_timeout:
                logger.critical("the engine made no progress for %.0f s; giving up", self.worker.silent_seconds)
                faulthandler.dump_traceback(all_threads=True)
                logging.shutdown()
                os._exit(ENGINE_FAILED)


class _Server(uvicorn.Server):
    """Asks before it stops: answers that are being written may end first."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]):
        super().__init__(config)
        self._on_signal = on_signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(LISTEN_BACKLOG)  # who waits in the kernel's queue is another matter

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(self._on_signal)


def _bind(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # its connections inherit it
    try:
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise LoadError(f"--host {options.host} --port {options.port}: {error}. Choose another port.") from error
    return listener


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
