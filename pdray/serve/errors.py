"""Every error as OpenAI's API tells it: status, headers, {"error": {message, type, param, code}}; or Anthropic's."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdray.errors import (
    ContextLengthError,
    InvalidRequestError,
    NoWorkerError,
    PdrayError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
)

logger = logging.getLogger(__name__)

NO_WORKER_RETRY_S = 2
MAX_MESSAGE_CHARS = 1000  # texts quote what the client sent


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        code: machine-readable reason beside the status; None for most.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "…"
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


ANTHROPIC_PATH = "/v1/messages"  # and what is below
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_body(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """The error as Anthropic's API tells it. The field at fault is named in its text."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = ANTHROPIC_TYPES.get(error.status, default)
    told = {"type": kind, "message": error.body["error"]["message"]}
    return {"type": "error", "error": told, "request_id": request_id}


def error_response(error: BaseException, path: str) -> Response:
    """The answer of an error, in the shape of the API that the path belongs to."""
    told = to_api_error(error)
    if path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"):
        return JSONResponse(anthropic_body(told), status_code=told.status, headers=told.headers)
    return told.response()


def to_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error. Unknown ones are logged and give nothing away."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            retry_after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(429, str(error), type="rate_limit_error", code="rate_limit_exceeded", headers=retry_after)
        case NoWorkerError():
            retry_after = {"Retry-After": str(NO_WORKER_RETRY_S)}
            return ApiError(503, str(error), type="server_error", code="service_unavailable", headers=retry_after)
        case RequestTimeoutError():
            return ApiError(504, str(error), type="server_error", code="timeout")
        case ContextLengthError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param)
        case ValidationError():
            problem = _first_problem(error)
            return ApiError(400, problem.message, param=problem.param)
        case RequestFailedError():
            # openai's clients try a 500 again on their own, unless told not to
            return ApiError(500, str(error), type="server_error", headers={"x-should-retry": "false"})
        case PdrayError():
            return ApiError(500, str(error), type="server_error")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    logger.error("internal error", exc_info=error)
    return ApiError(500, "internal error; the server's log says more", type="server_error")


class _Problem(NamedTuple):
    message: str
    param: str | None


def _first_problem(error: ValidationError) -> _Problem:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    param = str(problem["loc"][0]) if problem["loc"] else None
    ours = problem.get("ctx", {}).get("error")
    if isinstance(ours, InvalidRequestError):  # raised by a validator of ours; its text says it all
        return _Problem(str(ours), ours.param or param)
    return _Problem(f"{place or 'body'}: {problem['msg']}", param)


class InternalErrors:
    """ASGI middleware that answers what no handler expected, and ends it here.

    A handler for Exception would answer too, but Starlette raises the error again after that, and Serve would log a
    failed replica call.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = scope["type"] != "http"

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if started:
                raise
            await error_response(error, scope["path"])(scope, receive, send)


def install(app: FastAPI) -> None:
    """Answer every exception of a handler, and unknown routes and methods, in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(error, request.url.path)

    for kind in (ApiError, PdrayError, ValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(InternalErrors)
