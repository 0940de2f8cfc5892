"""/openapi.json is true: what it allows and what it forbids is answered so, in the shapes that it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
import schemathesis.generation.body_overrides  # at once: CPython 3.11 cannot always parse its sources in a deep draw
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from pydantic import BaseModel, SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.sampling_params import MAX_INT32, SamplingParams
from pdray.serve.api import create_app
from pdray.serve.protocol import ChatBody, CompletionBody
from pdray.testing.patience import PATIENCE_S

NEED_KEY = ("/tokenize", "/detokenize", "/tokenizer_info")  # beside what is below /v1
CONFIG = Config(served_model_name="smol")
CHECKS = [not_a_server_error, response_schema_conformance, content_type_conformance]
PARTS_OF_A_REQUEST = ("method", "url", "params", "headers", "json")
# What no schema of one field can say: fields that must agree, the served model, its context and vocabulary.
OBEYED = {"model": "smol", "stream_options": None, "max_tokens": 9, "min_tokens": 2, "echo": False}
OBEYED |= {"response_format": {"type": "json_object"}, "structured_outputs": None}  # one, which can be enforced
OBEYED |= {"truncate_prompt_tokens": 5, "thinking_token_budget": None}  # a model of no thoughts
OBEYED |= {"prompt_logprobs": None}  # not with stream
OBEYED_COMPLETION = OBEYED | {"best_of": None, "suffix": None}
OBEYED_CHAT = OBEYED | {"max_completion_tokens": 9, "continue_final_message": False, "top_logprobs": None}
OBEYED_CHAT |= {"chat_template_kwargs": None, "reasoning_effort": None}  # the template's own names
OBEYED_CHAT |= {"tool_choice": None}

OBEYED_RESPONSE = {"model": "smol", "input": "x", "max_output_tokens": 9, "chat_template_kwargs": None}
OBEYED_RESPONSE |= {"tools": None, "tool_choice": None, "text": None, "reasoning": None}  # OpenAI's own, checked apart
OBEYED_COUNT = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": None}
OBEYED_COUNT |= dict.fromkeys(("system", "thinking", "tools", "tool_choice", "output_config"))  # Anthropic's own
OBEYED_MESSAGE = OBEYED_COUNT | {"max_tokens": 9, "stop_sequences": None}

schema = schemathesis.openapi.from_dict(create_app(CONFIG, lambda: None).openapi())
bounded = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def ask(app: FastAPI, **request: Any) -> httpx.Response:
    """The answer, after everything that the request began has ended."""

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as http:
            response = await http.request(**request)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), PATIENCE_S)
        return response

    return asyncio.run(run())


@schema.parametrize()
@bounded
def test_whatever_is_asked(make_app: Callable[[Config], FastAPI], case: schemathesis.Case) -> None:
    given = case.as_transport_kwargs(base_url="http://pdray")
    request = {part: given[part] for part in PARTS_OF_A_REQUEST if given.get(part) is not None}
    response = ask(make_app(CONFIG), content=given.get("data"), **request)
    case.validate_response(response, checks=CHECKS)


allowed = schemathesis.openapi.from_dict(create_app(CONFIG, lambda: None).openapi()).include(method="POST")
allowed.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE])


@allowed.parametrize()
@bounded
def test_what_the_schema_allows_is_answered(make_app: Callable[..., FastAPI], case: schemathesis.Case) -> None:
    obeyed = {
        "/v1/completions": OBEYED_COMPLETION,
        "/v1/chat/completions": OBEYED_CHAT,
        "/v1/responses": OBEYED_RESPONSE,
        "/v1/messages": OBEYED_MESSAGE,
        "/v1/messages/count_tokens": OBEYED_COUNT,
        "/tokenize": OBEYED_CHAT if "messages" in case.body else {"model": "smol"},
        "/detokenize": {"model": "smol", "tokens": [120]},
    }
    body = case.body | obeyed[case.path]
    if case.path == "/v1/completions":
        body["prompt"] = body["prompt"] if isinstance(body["prompt"], str) and body["prompt"] else ["x", "y"]
    for message in body.get("messages", []):
        message["content"] = "x" if message.get("content") is None else message["content"]
        for name in ("refusal", "tool_calls", "tool_call_id", "reasoning", "reasoning_content"):
            message.pop(name, None)  # only messages of one role may have it
    if body.get("tools"):
        body["tools"] = body["tools"][:1]  # names must differ
    response = ask(make_app(CONFIG, max_model_len=10**6), method="POST", url=case.path, json=body)
    assert response.status_code == 200, response.text


RANGES = [
    (kind, name, schema)
    for kind in (CompletionBody, ChatBody)
    for name, field in kind.model_json_schema()["properties"].items()
    for schema in field.get("anyOf", [])
    if name in SamplingParams.__struct_fields__ and "maximum" in schema
]


@pytest.mark.parametrize("kind,name,schema", RANGES)
def test_ranges_are_those_of_sampling_params(kind: type[BaseModel], name: str, schema: dict[str, Any]) -> None:
    step = 1 if schema["type"] == "integer" else 1e-5  # is more than float32 rounds away
    lowest = schema["minimum"]

    def make(value: float) -> SamplingParams:
        return SamplingParams(**{"max_tokens": None, name: value})

    make(lowest), make(schema["maximum"])
    with pytest.raises(InvalidRequestError, match=f"{name} is"):
        make(lowest - step)
    if schema["maximum"] != MAX_INT32:  # that one is the API's own
        with pytest.raises(InvalidRequestError, match=f"{name} is"):
            make(schema["maximum"] + step)


def test_the_schema_says_who_needs_a_key() -> None:
    """And it can be read without one: test_auth."""
    paths = create_app(CONFIG.model_copy(update={"api_key": SecretStr("key")}), lambda: None).openapi()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            assert ("security" in operation) is (path.startswith("/v1/") or path in NEED_KEY)
