"""The API key: who may use /v1."""

from __future__ import annotations

import hmac

from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from pdray.serve.errors import ApiError


class ApiKey(HTTPBearer):
    """A dependency that lets a request through only with the key; it looks at no more than the headers."""

    def __init__(self, key: SecretStr) -> None:
        super().__init__(scheme_name="API key", auto_error=False)
        self._key = key.get_secret_value().encode()

    async def __call__(self, request: HTTPConnection) -> HTTPAuthorizationCredentials:
        """Raises ApiError 401."""
        given = await super().__call__(request)
        if given is None:
            raise _unauthorized("this server needs an API key; send it as the header 'Authorization: Bearer <key>'")
        if not hmac.compare_digest(given.credentials.encode("latin-1"), self._key):  # as ASGI servers decode headers
            raise _unauthorized("the API key is not this server's")
        return given


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
