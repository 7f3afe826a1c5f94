"""The application: routes, health, and how every error looks."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from runtime.errors import Error
from runtime.request import SamplingParams
from runtime.server import completions, native
from runtime.server.errors import STATUS, ErrorBody, describe, error_response
from runtime.server.gate import Gate
from runtime.server.metrics import Metrics
from runtime.server.options import ServerOptions
from runtime.server.service import Disconnected, Service
from runtime.worker import Worker

logger = logging.getLogger(__name__)

GENERATE_SECONDS = 20.0


def build_app(worker: Worker, options: ServerOptions, metrics: Metrics) -> FastAPI:
    """The ASGI application that serves ``worker``. Raises :class:`LoadError` for unusable options."""
    app = FastAPI(
        title="relinear",
        version=native.package_version(),
        docs_url=None,
        redoc_url=None,
        root_path=options.root_path.rstrip("/"),
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.service = Service(worker, options, metrics)
    app.include_router(completions.router)
    app.include_router(native.router)
    unhealthy: dict[int | str, dict[str, Any]] = {503: {"description": "loading, draining, stuck or dead"}}
    for path, answer in (("/health", health), ("/ping", health), ("/health_generate", health_generate)):
        app.add_api_route(path, answer, responses=unhealthy)
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", exposition, response_class=PlainTextResponse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Disconnected, _nobody)
    app.add_exception_handler(Exception, _failed)
    for kind in (*STATUS, Error):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(Gate, limits=options.limits(), on_refusal=metrics.rejected)
    return app


async def health(request: Request) -> Response:
    """200 only while the engine makes progress, or could."""
    service: Service = request.app.state.service
    worker, silent = service.worker, service.worker.silent_seconds
    if worker.error is not None:
        status = "dead"
    elif worker.engine is None:
        status = "loading"
    elif worker.draining:
        status = "draining"
    elif silent > service.options.watchdog_timeout / 2:
        status = "stuck"
    else:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": status, "silent_seconds": round(silent, 1)}, 503)


async def health_generate(request: Request) -> Response:
    """As :func:`health`, once a token has been generated."""
    service: Service = request.app.state.service
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, cache_salt="health")
    try:
        async with asyncio.timeout(GENERATE_SECONDS):
            await service.collect(request, await service.submit([[0]], params))
    except TimeoutError:
        return JSONResponse({"status": "stuck", "silent_seconds": round(service.worker.silent_seconds, 1)}, 503)
    return await health(request)


async def exposition(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _failed(request: Request, error: Exception) -> Response:
    status, message, code, param = describe(error)
    if status == 500:
        logger.error("%s failed: %s", request.url.path, error, exc_info=None if isinstance(error, Error) else error)
    request.app.state.service.metrics.rejected(status)
    return error_response(status, message, code, param)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body: its place and what was expected, not what came."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = next(iter(error.errors()), {"loc": (), "msg": "invalid"})
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    request.app.state.service.metrics.rejected(400)
    return error_response(400, message[:1000], None, re.match(r"\w*", place)[0] or None)  # type: ignore[index]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path[:256]}: {message}"
    request.app.state.service.metrics.rejected(error.status_code)
    return error_response(error.status_code, message)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
