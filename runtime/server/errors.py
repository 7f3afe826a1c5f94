"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from runtime.errors import EngineDead, Error, InvalidRequest, Overloaded

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ModelNotFound(Error):
    """A request that names a model which is not served."""


class NotReady(Error):
    """The server is loading, or about to end."""


STATUS: dict[type[Exception], int] = {
    InvalidRequest: 400,
    ModelNotFound: 404,
    Overloaded: 429,
    NotReady: 503,
    EngineDead: 503,
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The shape of :func:`error_body`, for the schema."""

    error: ErrorDetail


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    headers = {"retry-after": "1"} if status in (429, 503) else None
    # A message may quote what came, which may hold half a surrogate pair: ASCII JSON can say that, UTF-8 cannot.
    response = JSONResponse(None, status, headers)
    response.body = json.dumps(error_body(status, message, code, param)).encode()
    response.headers["content-length"] = str(len(response.body))
    return response


def describe(error: Exception) -> tuple[int, str, str | None, str | None]:
    """Status, message, code and parameter for an exception; an unexpected one says nothing about its cause."""
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    if status == 500 and not isinstance(error, Error):
        return 500, "the request failed unexpectedly; the server's log has the cause.", None, None
    message = str(error)
    code = "model_not_found" if status == 404 else None
    named = re.match(r"([A-Za-z_]\w*)(:| must| cannot| is| needs)", message) if status == 400 else None
    return status, message, code, named[1] if named else ("model" if status == 404 else None)
