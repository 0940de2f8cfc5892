"""A request's body: read within its bound, parsed as strict JSON, checked."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from pdray.serve.connection import ClientGone
from pdray.serve.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The request's body, whatever its Content-Type says.

    Raises:
        ApiError: 413 as soon as it is known to be too large; 400 if it is no JSON object. msgspec refuses what RFC 8259
            does (NaN, Infinity, invalid UTF-8), lone surrogates, and numbers that no float can hold.
        ValidationError: it is not of this kind (400). ClientGone: it never came to its end.
    """
    raw = await _read(request, max_bytes)
    try:
        value = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_json_name(value)}")
    return kind.model_validate(value)


async def _read(request: Request, max_bytes: int) -> bytearray:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes (max_request_bytes)")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ClientGone from None
    return raw


def _json_name(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
    return "an array"
