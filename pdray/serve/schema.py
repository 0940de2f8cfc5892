"""/openapi.json: the bodies that the handlers read themselves, and the shape of every error."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pdray.serve.messages_body import CountTokensBody, MessagesBody
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.serve.responses_body import ResponsesBody
from pdray.serve.tokens_api import DetokenizeBody, TokenizeBody, TokenizeChatBody

BODIES: tuple[type[BaseModel], ...] = (
    CompletionBody,
    ChatBody,
    ResponsesBody,
    MessagesBody,
    CountTokensBody,
    TokenizeBody,
    TokenizeChatBody,
    DetokenizeBody,
)
REF = "#/components/schemas/{model}"


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: Error


class MessagesError(BaseModel):
    type: str
    message: str


class MessagesErrorAnswer(BaseModel):
    """As Anthropic's API tells of an error."""

    type: Literal["error"]
    error: MessagesError
    request_id: str | None


ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer, "description": "An error"}}
GENERATED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, whole or, with stream=true, in events", "content": {"text/event-stream": {}}}
}

MESSAGES_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": MessagesErrorAnswer, "description": "An error"}
}


def request_body(*kinds: type[BaseModel]) -> dict[str, Any]:
    """A route's openapi_extra: it takes a body of one of these kinds."""
    references = [{"$ref": REF.format(model=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Put into the schema what request_body() refers to."""
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
            made_by_fastapi()["components"]["schemas"] |= bodies["$defs"]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
