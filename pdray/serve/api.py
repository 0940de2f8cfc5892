"""The OpenAI-compatible API as a FastAPI application around a router. Knows no Ray."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

import pdray
from pdray.config import Config
from pdray.errors import NoWorkerError
from pdray.router.router import Router
from pdray.serve.auth import ApiKey
from pdray.serve.body import read_body
from pdray.serve.connection import ClientGone
from pdray.serve.endpoints import Chat, Completion, render_chat
from pdray.serve.errors import ApiError, install
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.schema import ERRORS, GENERATED, describe_bodies, request_body

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_CLOSED_REQUEST = 499
MAX_LOGGED_CHARS = 2000

logger = logging.getLogger(__name__)


def create_app(
    config: Config,
    get_router: Callable[[], Router | None],
    why_no_router: Callable[[], str] = lambda: "the server is starting; try again shortly",
) -> FastAPI:
    """Args:
    get_router: the router, or None while there is none yet.
    why_no_router: what it waits for.
    """
    app = FastAPI(title="pdray", version=pdray.__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    install(app)
    describe_bodies(app)
    v1 = APIRouter(prefix="/v1", dependencies=[] if config.api_key is None else [Depends(ApiKey(config.api_key))])
    started = int(time.time())

    def router() -> Router:
        current = get_router()
        if current is None:
            raise NoWorkerError(why_no_router())
        return current

    def check_model(name: str | None) -> None:
        if name is not None and name != config.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def log_prompt(request_id: str, prompt: object) -> None:
        if config.log_prompts:
            logger.info("%s: %s", request_id, repr(prompt)[:MAX_LOGGED_CHARS])

    def model_card() -> dict[str, Any]:
        current = get_router()
        return {
            "id": config.model_name,
            "object": "model",
            "created": started,
            "owned_by": "pdray",
            "root": config.model,
            "max_model_len": None if current is None else current.max_model_len,
        }

    @v1.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @v1.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        check_model(name)
        return model_card()

    @v1.post("/completions", responses=GENERATED, openapi_extra=request_body(CompletionBody))
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("cmpl", request)
        log_prompt(request_id, body.prompt)
        generation = Completion(body, request_id, config.model_name, router().tokenizer, router().sampling_defaults)
        return await generation.respond(request, router())

    @v1.post("/chat/completions", responses=GENERATED, openapi_extra=request_body(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("chatcmpl", request)
        log_prompt(request_id, [message.plain() for message in body.messages])
        prompt_token_ids = await render_chat(body, router().tokenizer, router().max_model_len)
        generation = Chat(body, prompt_token_ids, request_id, config.model_name, router().sampling_defaults)
        return await generation.respond(request, router())

    app.include_router(v1)

    @app.get("/ping")
    @app.get("/health")
    async def health() -> Response:
        """200 once a request could be served, else 503."""
        if not (current := router()).ready:
            raise NoWorkerError(current.why_not_ready)
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": pdray.__version__}

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    return app


def _request_id(prefix: str, request: Request) -> str:
    """The client's X-Request-Id where it is sane, made unique; else a new one.

    Serve gives requests without that header one, and returns it with the response.
    """
    given = request.headers.get("x-request-id", "")
    unique = uuid.uuid4().hex
    return f"{prefix}-{given}-{unique[:8]}" if REQUEST_ID.fullmatch(given) else f"{prefix}-{unique}"
