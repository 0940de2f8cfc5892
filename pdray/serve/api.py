"""The OpenAI-compatible API as a FastAPI application around a router. Knows no Ray."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

import pdray
from pdray.config import Config
from pdray.errors import NoWorkerError
from pdray.exposition import CONTENT_TYPE
from pdray.router.chat_template import ChatTemplate
from pdray.router.router import Router
from pdray.serve import messages_body
from pdray.serve.auth import ApiKey
from pdray.serve.body import read_body
from pdray.serve.connection import ClientGone
from pdray.serve.endpoints import Chat, Completion, render_chat
from pdray.serve.errors import ApiError, install
from pdray.serve.messages_api import Messages
from pdray.serve.messages_body import CountTokensBody, MessagesBody
from pdray.serve.paths import LenientPaths
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses_api import Responses
from pdray.serve.responses_body import ResponsesBody, own_names, to_chat
from pdray.serve.schema import ERRORS, GENERATED, MESSAGES_ERRORS, describe_bodies, request_body
from pdray.serve.tokens_api import (
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
    count_tokens,
    detokenize,
    parse_tokenize,
    tokenize,
    tokenizer_info,
)

if TYPE_CHECKING:
    from pdray.metrics import RouterMetrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_CLOSED_REQUEST = 499
MAX_LOGGED_CHARS = 2000

logger = logging.getLogger(__name__)


def create_app(
    config: Config,
    get_router: Callable[[], Router | None],
    why_no_router: Callable[[], str] = lambda: "the server is starting; try again shortly",
    metrics: RouterMetrics | None = None,
) -> FastAPI:
    """Args:
    get_router: the router, or None while there is none yet.
    why_no_router: what it waits for.
    metrics: what the router measures.
    """
    app = FastAPI(
        title="pdray",
        version=pdray.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
    )
    install(app)
    app.add_middleware(LenientPaths)
    if config.allowed_origins:  # outermost, so that errors, too, can be read by a page
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    describe_bodies(app)
    needs_key = [Depends(ApiKey(config.api_keys))] if config.api_keys else []
    v1 = APIRouter(prefix="/v1", dependencies=needs_key)
    started = int(time.time())
    template: ChatTemplate | None = None

    def router() -> Router:
        current = get_router()
        if current is None:
            raise NoWorkerError(why_no_router())
        return current

    def chat_template() -> ChatTemplate:
        """The router's tokenizer's; it remembers what it has found out about templates."""
        nonlocal template
        tokenizer = router().tokenizer
        if template is None or template.tokenizer is not tokenizer:
            template = ChatTemplate(tokenizer)
        return template

    def check_model(name: str | None) -> None:
        if name is not None and name not in config.model_names:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {' and '.join(map(repr, config.model_names))}",
                param="model",
                code="model_not_found",
            )

    def log_prompt(request_id: str, prompt: object) -> None:
        if config.log_prompts:
            logger.info("%s: %s", request_id, repr(prompt)[:MAX_LOGGED_CHARS])

    def model_card(name: str) -> dict[str, Any]:
        current = get_router()
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "pdray",
            "root": config.model,
            "max_model_len": None if current is None else current.max_model_len,
        }

    @v1.get("/models")
    async def list_models() -> dict[str, Any]:
        """The names that the model is served by."""
        return {"object": "list", "data": [model_card(name) for name in config.model_names]}

    @v1.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """One of them."""
        check_model(name)
        return model_card(name)

    @v1.post("/completions", responses=GENERATED, openapi_extra=request_body(CompletionBody))
    async def completions(request: Request) -> Response:
        """Texts that go on from prompts."""
        body = await read_body(request, CompletionBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("cmpl", request)
        log_prompt(request_id, body.prompt)
        generation = Completion(body, request_id, config.model_name, router().tokenizer, router().sampling_defaults)
        return await generation.respond(request, router())

    @v1.post("/chat/completions", responses=GENERATED, openapi_extra=request_body(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """An assistant's next message."""
        body = await read_body(request, ChatBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("chatcmpl", request)
        log_prompt(request_id, [(message.role, message.text) for message in body.messages])
        chat = await render_chat(body, chat_template(), config)
        generation = Chat(body, chat, request_id, config.model_name, router().sampling_defaults)
        return await generation.respond(request, router())

    @v1.post("/responses", responses=GENERATED, openapi_extra=request_body(ResponsesBody))
    async def responses(request: Request) -> Response:
        """The same in OpenAI's newer form, without a memory."""
        body = await read_body(request, ResponsesBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("resp", request, "_")
        log_prompt(request_id, body.input)
        names = own_names()
        with names.told():
            chat_body = to_chat(body, names)
            chat = await render_chat(chat_body, chat_template(), config)
            current = router()
            generation = Responses(
                body, chat_body, chat, request_id, config.model_name, current.sampling_defaults, current.tokenizer
            )
            return await generation.respond(request, current)

    @v1.post("/messages", responses=GENERATED | MESSAGES_ERRORS, openapi_extra=request_body(MessagesBody))
    async def messages(request: Request) -> Response:
        """An assistant's next message, as Anthropic's API asks for it."""
        body = await read_body(request, MessagesBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        request_id = _request_id("msg", request, "_")
        log_prompt(request_id, body.messages)
        names = messages_body.own_names()
        with names.told():
            chat_body = messages_body.to_chat(body, names)
            chat = await render_chat(chat_body, chat_template(), config)
            current = router()
            generation = Messages(chat_body, chat, request_id, config.model_name, current.sampling_defaults, names)
            return await generation.respond(request, current)

    @v1.post("/messages/count_tokens", responses=MESSAGES_ERRORS, openapi_extra=request_body(CountTokensBody))
    async def count_message_tokens(request: Request) -> dict[str, int]:
        """Tokens of such a request's prompt."""
        body = await read_body(request, CountTokensBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        names = messages_body.own_names()
        with names.told():
            chat_body = messages_body.to_chat(body, names)
            return {"input_tokens": await count_tokens(chat_body, chat_template(), router().tokenizer, config)}

    app.include_router(v1)

    @app.post("/tokenize", dependencies=needs_key, openapi_extra=request_body(TokenizeBody, TokenizeChatBody))
    async def tokenize_prompt(request: Request) -> dict[str, Any]:
        """Token ids of a prompt or a conversation."""
        body = await read_body(request, parse_tokenize, config.max_request_bytes)
        check_model(body.model)
        current = router()
        return await tokenize(body, chat_template(), current.tokenizer, current.max_model_len, config)

    @app.post("/detokenize", dependencies=needs_key, openapi_extra=request_body(DetokenizeBody))
    async def detokenize_tokens(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        body = await read_body(request, DetokenizeBody.model_validate, config.max_request_bytes)
        check_model(body.model)
        return await detokenize(body, router().tokenizer)

    @app.get("/tokenizer_info", dependencies=needs_key)
    async def describe_tokenizer() -> dict[str, Any]:
        """The tokenizer's class, special tokens and chat template."""
        return tokenizer_info(router().tokenizer)

    @app.get("/ping")
    @app.get("/health")
    async def health() -> Response:
        """200 once a request could be served, else 503."""
        if not (current := router()).ready:
            raise NoWorkerError(current.why_not_ready)
        return JSONResponse({"status": "ok"})

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Requests that run or wait at this router."""
        stats = {} if (current := get_router()) is None else current.stats()
        return {"server_load": stats.get("running", 0) + stats.get("queue_depth", 0)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus_metrics() -> Response:
        """This router's, in Prometheus' text format."""
        if metrics is None or (current := get_router()) is None:
            raise NoWorkerError(why_no_router())
        return Response(metrics_text(metrics, current, vllm=config.vllm_metrics), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """pdray's version."""
        return {"version": pdray.__version__}

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    return app


def metrics_text(metrics: RouterMetrics, router: Router, *, vllm: bool) -> bytes:
    """/metrics, with what the router knows of its workers now."""
    pools = router.pools
    total, free = sum(pool.num_blocks for pool in pools), sum(pool.free_blocks for pool in pools)
    cache = {"block_size": str(pools[0].block_size), "num_gpu_blocks": str(total)} if pools else None
    return metrics.text(
        vllm=vllm,
        cache_config=cache,
        running=router.stats()["running"],
        kv_usage=1.0 - free / total if total else 0.0,
    )


def _request_id(prefix: str, request: Request, separator: str = "-") -> str:
    """The client's X-Request-Id where it is sane, made unique; else a new one.

    Serve gives requests without that header one, and returns it with the response.
    """
    given = request.headers.get("x-request-id", "")
    unique = uuid.uuid4().hex
    own = f"{given}-{unique[:8]}" if REQUEST_ID.fullmatch(given) else unique
    return f"{prefix}{separator}{own}"
