"""A request's body: read within its bound, inflated, parsed as strict JSON, checked."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from pdray.router.conversation import kind_of
from pdray.serve.connection import ClientGone
from pdray.serve.errors import ApiError
from pdray.serve.inflate import Inflater, coding_of

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, parse: Callable[[dict[str, Any]], Body], max_bytes: int) -> Body:
    """The request's body, whatever its Content-Type says.

    Args:
        parse: makes it of a JSON object, as a model's model_validate.

    Raises:
        ApiError: 413 as soon as it is known to be too large, inflated or not; 415 for a Content-Encoding other than
            gzip and deflate; 400 if it is no JSON object. msgspec refuses what RFC 8259 does (NaN, Infinity, invalid
            UTF-8), lone surrogates, and numbers that no float can hold.
        ValidationError: parse() refuses it (400). ClientGone: it never came to its end.
    """
    raw = await _read(request, max_bytes)
    text = memoryview(raw)[len(codecs.BOM_UTF8) :] if raw.startswith(codecs.BOM_UTF8) else raw
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {kind_of(value)}")
    return parse(value)


async def _read(request: Request, max_bytes: int) -> bytearray:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes (max_request_bytes)")
    coding = coding_of(",".join(request.headers.getlist("content-encoding")))
    inflater = None if coding is None else Inflater(coding, max_bytes)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    raw = bytearray()
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large
            if inflater is None:
                raw += chunk
            else:
                inflater.feed(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    return raw if inflater is None else inflater.finish()
