"""API keys: who may use /v1."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from pdray.serve.errors import ApiError


class ApiKey(HTTPBearer):
    """A dependency that lets a request through only with one of the keys; it looks at no more than the headers."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(scheme_name="API key", auto_error=False)
        self._keys = [key.encode() for key in keys]

    async def __call__(self, request: HTTPConnection) -> HTTPAuthorizationCredentials:
        """Raises ApiError 401."""
        given = await super().__call__(request)
        if given is None and (key := request.headers.get("x-api-key")) is not None:  # as Anthropic's clients send it
            given = HTTPAuthorizationCredentials(scheme="x-api-key", credentials=key)
        if given is None:
            raise _unauthorized(
                "this server needs an API key; send it as the header 'Authorization: Bearer <key>', or as x-api-key"
            )
        sent = given.credentials.encode("latin-1")  # as ASGI servers decode headers
        if not any([hmac.compare_digest(sent, key) for key in self._keys]):  # all, so that time tells nothing
            raise _unauthorized("the API key is not this server's")
        return given


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
