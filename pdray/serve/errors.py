"""Every error as OpenAI's API tells it: status, headers, {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdray.errors import (
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
        case InvalidRequestError():
            is_length = "context length" in str(error)
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded" if is_length else None)
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
            await to_api_error(error).response()(scope, receive, send)


def install(app: FastAPI) -> None:
    """Answer every exception of a handler, and unknown routes and methods, in this shape."""

    async def answer(_: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    for kind in (ApiError, PdrayError, ValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(InternalErrors)
