"""Paths and methods as clients write them: doubled and trailing slashes, and HEAD for what GET answers."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SLASHES = re.compile("/{2,}")


class LenientPaths:
    """ASGI middleware. Base URLs that end in a slash lead to `//v1/...`; a redirect would cost a request more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = SLASHES.sub("/", scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/"}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
